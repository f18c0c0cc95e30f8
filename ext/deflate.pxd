# Deflate (RFC 1951) of the byte planes of HDF5's shuffle filter, each plane in the way that suits it.
#
# Most planes of a chunk have long runs of one byte value, coded as a byte and its repetitions; consecutive planes of this kind
# share a block. The other planes change from row to row and get a Huffman code each, or are stored uncoded where a code gains
# nothing (the lowest bytes of times). There is no search for repetitions, which takes twice the time on such rows, and no code
# for several changing planes, which makes the result larger by a fifth. Codes are kept for the next chunks, because chunks of a
# run are alike, and the making of codes takes a fifth of the time.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #define lowest_byte(x) (__builtin_ctzll(x) >> 3)
    #define highest_bit(x) (63 - __builtin_clzll(x))
    static const uint8_t order_of_lengths[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

    typedef uint8_t Lanes8 __attribute__((vector_size(16)));
    typedef uint16_t Lanes16 __attribute__((vector_size(32)));
    #if defined(__clang__) || __GNUC__ >= 9
    #define WIDEN(x) __builtin_convertvector(x, Lanes16)
    #else
    #error "GCC 9 or clang is needed"
    #endif

    /* Add the sums of `n` groups of 16 bytes, lane by lane, to sums, and the sums after each group to sums_of_sums. */
    static inline void add_lanes(const uint8_t* data, uint32_t n, uint32_t* sums, uint32_t* sums_of_sums) {
        for (uint32_t first = 0; first < n; first += 16) {      /* 16 groups: up to 255 * 16 * 17 / 2 in 16 bits */
            uint32_t some = n - first < 16 ? n - first : 16;
            Lanes16 a = {0}, b = {0};
            for (uint32_t i = 0; i < some; i++) {
                Lanes8 bytes;
                memcpy(&bytes, data + 16 * (first + i), 16);
                b += a;
                a += WIDEN(bytes);
            }
            for (int j = 0; j < 16; j++) {
                sums_of_sums[j] += some * sums[j] + b[j];
                sums[j] += a[j];
            }
        }
    }
    """
    int lowest_byte(uint64_t x) noexcept nogil
    int highest_bit(uint64_t x) noexcept nogil
    const uint8_t[19] order_of_lengths
    void add_lanes(const uint8_t* data, uint32_t n, uint32_t* sums, uint32_t* sums_of_sums) noexcept nogil

cdef enum:
    LITERALS = 286             # symbols: 256 bytes, the end of the block, 29 lengths of repetitions
    END_OF_BLOCK = 256
    LONGEST = 258              # longest repetition
    MOST_BITS = 14             # of a code, so that four codes and the rest of a byte fit into 64 bits
    CODE_LENGTHS = 19
    CODE_LENGTH_BITS = 7
    STORED_MOST = 65535        # bytes of a stored block
    SAMPLES = 8                # number of samples that decide about a plane
    SAMPLE = 64                # bytes of a sample
    ADLER_PIECE = 5504         # maximum bytes (a multiple of 16) whose sums fit into 32 bits
    KEPT_FOR = 15              # further planes for which a code is kept, of at least KEPT_FROM bytes
    KEPT_FROM = 4096
    KEPT_CHANGE = 128          # a plane gets a new code if it takes 1 / KEPT_CHANGE more or less room than the first one
    RUNS_CHANGE = 16           # the same for runs, which take a small part of a chunk
    HEADER_BYTES = 576         # of a code's header, with 8 more that put() may write
    UNKNOWN = 0x8000           # in an entry: the byte has no code
    CODE_BITS = 0x3FFF         # in an entry: MOST_BITS bits

cdef struct Bits:
    uint8_t* at
    uint64_t pending           # bits not written yet
    uint32_t n                 # their number, below 8 between two calls

cdef struct Code:
    uint32_t n                 # number of symbols, up to the last used symbol
    uint32_t counts[LITERALS]
    uint8_t lengths[LITERALS]
    uint32_t entries[LITERALS] # bits of the code, the first bit lowest, and from bit 16 on their number

cdef struct KeptCode:
    Code code
    uint32_t left              # further planes for which it may be used
    uint32_t header_bits       # of the header of a block with this code
    uint64_t n                 # bytes of the plane, or tokens, for which it was made
    uint64_t size              # bytes that these take with it
    uint8_t header[HEADER_BYTES]

cdef struct Repetition:
    uint32_t symbol            # of its length
    uint32_t extra             # extra bits after the symbol
    uint32_t n_extra           # their number


cdef inline void put(Bits* bits, uint64_t value, uint32_t n) noexcept nogil:
    """Write up to 56 bits, the lowest first. Stores 8 bytes, of which later calls overwrite the unused ones."""
    bits.pending |= value << bits.n
    bits.n += n
    memcpy(bits.at, &bits.pending, 8)
    bits.at += bits.n >> 3
    bits.pending >>= bits.n & 56
    bits.n &= 7


# Huffman codes

cdef inline void lengths_of(const uint32_t* counts, uint32_t n, uint32_t most, uint8_t* lengths) noexcept nogil:
    """Find the lengths, up to `most` bits, of a Huffman code for n symbols with these counts; 0 for an unused symbol."""
    cdef uint64_t[LITERALS] leaves      # count, and the symbol in the lowest 16 bits
    cdef uint64_t[LITERALS] others
    cdef uint32_t[256] places
    cdef uint64_t[LITERALS] inner       # sum of the counts below an inner node
    cdef uint16_t[2 * LITERALS] parent  # of leaves, then of inner nodes
    cdef uint16_t[LITERALS] depth       # of inner nodes
    cdef uint32_t[64] of_length
    cdef uint32_t used = 0, i, j, place, digit, shift, leaf, node, made, length
    cdef uint64_t total, largest = 0
    for i in range(n):
        lengths[i] = 0
        if counts[i]:
            leaves[used] = (<uint64_t>counts[i] << 16) | i
            largest |= leaves[used]
            used += 1
    if used < 2:
        for i in range(used):
            lengths[leaves[i] & 0xFFFF] = 1
        return
    shift = 16
    while largest >> shift:                 # sort by the counts, 8 bits at a time
        memset(places, 0, sizeof(places))
        for i in range(used):
            places[(leaves[i] >> shift) & 255] += 1
        place = 0
        for digit in range(256):
            j = places[digit]
            places[digit] = place
            place += j
        for i in range(used):
            digit = (leaves[i] >> shift) & 255
            others[places[digit]] = leaves[i]
            places[digit] += 1
        memcpy(leaves, others, used * sizeof(leaves[0]))
        shift += 8
    # Inner nodes are made in the order of their counts, so the two smallest nodes are the next leaves or inner nodes.
    leaf = node = 0
    for made in range(used - 1):
        inner[made] = 0
        for j in range(2):
            if leaf < used and (node == made or (leaves[leaf] >> 16) <= inner[node]):
                inner[made] += leaves[leaf] >> 16
                parent[leaf] = made
                leaf += 1
            else:
                inner[made] += inner[node]
                parent[LITERALS + node] = made
                node += 1
    memset(of_length, 0, sizeof(of_length))
    depth[used - 2] = 0
    for i in range(used - 2, 0, -1):
        depth[i - 1] = depth[parent[LITERALS + i - 1]] + 1
    for i in range(used):
        of_length[min(<uint32_t>depth[parent[i]] + 1, most)] += 1
    # Lengths cut to `most` bits give too many codes. Until the codes fit, a shorter code is replaced by two codes that are
    # longer by one bit, and one code of `most` bits takes the second of them.
    total = 0
    for i in range(1, most + 1):
        total += <uint64_t>of_length[i] << (most - i)
    while total > <uint64_t>1 << most:
        of_length[most] -= 1
        i = most - 1
        while not of_length[i]:
            i -= 1
        of_length[i] -= 1
        of_length[i + 1] += 2
        total -= 1
    i = 0
    for length in range(most, 0, -1):       # the rarest symbols get the longest codes
        for j in range(of_length[length]):
            lengths[leaves[i] & 0xFFFF] = length
            i += 1


cdef inline void entries_of(const uint8_t* lengths, uint32_t n, uint32_t* entries) noexcept nogil:
    """Make the canonical code of these lengths (RFC 1951, 3.2.2)."""
    cdef uint32_t[16] following
    cdef uint32_t[16] of_length
    cdef uint32_t i, j, code, reverse
    memset(of_length, 0, sizeof(of_length))
    for i in range(n):
        of_length[lengths[i]] += 1
    of_length[0] = 0
    following[0] = 0
    for i in range(1, 16):
        following[i] = (following[i - 1] + of_length[i - 1]) << 1
    for i in range(n):
        entries[i] = 0
        if lengths[i]:
            code = following[lengths[i]]
            following[lengths[i]] += 1
            reverse = 0
            for j in range(lengths[i]):
                reverse = (reverse << 1) | ((code >> j) & 1)
            entries[i] = reverse | (<uint32_t>lengths[i] << 16)


cdef inline uint64_t make_code(Code* code) noexcept nogil:
    """Make a code from its counts. Returns the bits of a block coded with it, without its header."""
    cdef uint64_t total = 0
    cdef uint32_t i
    code.counts[END_OF_BLOCK] = 1
    code.n = LITERALS
    while not code.counts[code.n - 1]:
        code.n -= 1
    lengths_of(code.counts, code.n, MOST_BITS, code.lengths)
    for i in range(code.n):
        total += <uint64_t>code.counts[i] * code.lengths[i]
    return total


cdef inline void put_code(Bits* bits, Code* code) noexcept nogil:
    """Write the header of a block with its own code. The only distance of repetitions is 1."""
    cdef uint8_t[LITERALS + 1] all_lengths
    cdef uint8_t[LITERALS + 1] symbols
    cdef uint8_t[LITERALS + 1] extra
    cdef uint32_t[CODE_LENGTHS] counts
    cdef uint8_t[CODE_LENGTHS] lengths
    cdef uint32_t[CODE_LENGTHS] entries
    cdef uint32_t i, n = 0, at = 0, run, some, entry
    entries_of(code.lengths, code.n, code.entries)
    memcpy(all_lengths, code.lengths, code.n)
    all_lengths[code.n] = 1                 # of distance 1
    memset(counts, 0, sizeof(counts))
    while at < code.n + 1:
        run = 1
        while at + run < code.n + 1 and all_lengths[at + run] == all_lengths[at]:
            run += 1
        if all_lengths[at] == 0 and run >= 3:
            some = min(run, <uint32_t>138)
            symbols[n] = 18 if some > 10 else 17
            extra[n] = <uint8_t>(some - (11 if some > 10 else 3))
        elif at and all_lengths[at] == all_lengths[at - 1] and run >= 3:
            some = min(run, <uint32_t>6)
            symbols[n] = 16
            extra[n] = <uint8_t>(some - 3)
        else:
            some = 1
            symbols[n] = all_lengths[at]
        counts[symbols[n]] += 1
        n += 1
        at += some
    lengths_of(counts, CODE_LENGTHS, CODE_LENGTH_BITS, lengths)
    entries_of(lengths, CODE_LENGTHS, entries)
    some = CODE_LENGTHS
    while not lengths[order_of_lengths[some - 1]]:
        some -= 1
    put(bits, 4 | (code.n - 257) << 3 | 0 << 8 | (some - 4) << 13, 17)
    for i in range(some):
        put(bits, lengths[order_of_lengths[i]], 3)
    for i in range(n):
        entry = entries[symbols[i]]
        put(bits, entry & 0xFFFF, entry >> 16)
        if symbols[i] >= 16:
            put(bits, extra[i], 2 if symbols[i] == 16 else 3 if symbols[i] == 17 else 7)


# Blocks

cdef inline Repetition repetition(uint32_t length) noexcept nogil:
    """Code a repetition of the previous byte, `length` times: 3 to LONGEST (RFC 1951, 3.2.5)."""
    cdef Repetition coded
    cdef uint32_t beyond = length - 3
    if length == LONGEST or beyond < 8:
        coded.symbol = LITERALS - 1 if length == LONGEST else 257 + beyond
        coded.extra = coded.n_extra = 0
        return coded
    coded.n_extra = highest_bit(beyond) - 2
    coded.symbol = 257 + 4 * coded.n_extra + (beyond >> coded.n_extra)
    coded.extra = beyond & ((<uint32_t>1 << coded.n_extra) - 1)
    return coded


cdef inline void put_stored(Bits* bits, const uint8_t* data, size_t n) noexcept nogil:
    cdef size_t some
    cdef uint32_t head
    while n:
        some = min(n, <size_t>STORED_MOST)
        put(bits, 0, 3)
        put(bits, 0, (8 - bits.n) & 7)
        head = <uint32_t>some | (<uint32_t>some ^ 0xFFFF) << 16
        put(bits, head, 32)
        memcpy(bits.at, data, some)
        bits.at += some
        data += some
        n -= some


cdef inline bint put_bytes(Bits* bits, const uint8_t* data, size_t n, const uint32_t* entries) noexcept nogil:
    """Write bytes with a code; returns whether it has a code for each of them. A byte takes at most MOST_BITS bits."""
    cdef uint32_t a, b, c, d, all_entries = 0
    cdef uint64_t low, high
    cdef size_t i = 0
    while i + 4 <= n:
        a = entries[data[i]]
        b = entries[data[i + 1]]
        c = entries[data[i + 2]]
        d = entries[data[i + 3]]
        all_entries |= a | b | c | d
        low = (a & CODE_BITS) | <uint64_t>(b & CODE_BITS) << (a >> 16)
        high = (c & CODE_BITS) | <uint64_t>(d & CODE_BITS) << (c >> 16)
        a = (a >> 16) + (b >> 16)
        put(bits, low | high << a, a + (c >> 16) + (d >> 16))
        i += 4
    while i < n:
        all_entries |= entries[data[i]]
        put(bits, entries[data[i]] & CODE_BITS, entries[data[i]] >> 16)
        i += 1
    put(bits, entries[END_OF_BLOCK] & 0xFFFF, entries[END_OF_BLOCK] >> 16)
    return not all_entries & UNKNOWN


cdef inline bint is_alike(uint64_t size, uint64_t expected, uint64_t part) noexcept nogil:
    """Whether the difference is at most 1 / part."""
    return (size - expected if size > expected else expected - size) * part <= expected


cdef inline void keep_code(KeptCode* kept) noexcept nogil:
    """Make the header of a block with the code, and mark symbols without code."""
    cdef Bits header
    cdef uint32_t i
    header.at = kept.header
    header.pending = header.n = 0
    put_code(&header, &kept.code)
    kept.header_bits = <uint32_t>(8 * (header.at - kept.header)) + header.n
    for i in range(<uint32_t>LITERALS):
        if i >= kept.code.n or not kept.code.entries[i]:
            kept.code.entries[i] = 1 << 16 | UNKNOWN


cdef inline void put_header(Bits* bits, const KeptCode* kept) noexcept nogil:
    cdef uint32_t n = kept.header_bits
    cdef const uint8_t* header = &kept.header[0]
    cdef uint64_t word
    while n:
        memcpy(&word, header, 8)
        put(bits, word & ((<uint64_t>1 << min(n, <uint32_t>56)) - 1), min(n, <uint32_t>56))
        header += 7
        n -= min(n, <uint32_t>56)


cdef inline bint put_kept(Bits* bits, const uint8_t* data, size_t n, KeptCode* kept) noexcept nogil:
    """Write a plane with the code of an earlier one; returns False, with nothing written, if it is not good for it."""
    cdef Bits before = bits[0]
    cdef uint64_t size
    if not kept.left or kept.n != n:
        return False
    put_header(bits, kept)
    if put_bytes(bits, data, n, kept.code.entries):
        size = bits.at - before.at
        if size <= n and is_alike(size, kept.size, KEPT_CHANGE):
            kept.left -= 1
            return True
    bits[0] = before
    return False


cdef inline void put_plane(Bits* bits, const uint8_t* data, size_t n, KeptCode* kept) noexcept nogil:
    """Write a plane whose bytes change, with a code or stored."""
    cdef uint32_t[4][256] counts
    cdef size_t i
    cdef uint64_t word
    cdef Code* code = &kept.code
    cdef uint8_t* begin = bits.at
    if is_random(data, n):
        put_stored(bits, data, n)
        return
    if put_kept(bits, data, n, kept):
        return
    kept.left = 0
    memset(counts, 0, sizeof(counts))
    i = 0
    while i + 8 <= n:
        # Four tables, because an increment waits for the previous increment of the same count.
        memcpy(&word, data + i, 8)
        counts[0][word & 255] += 1
        counts[1][(word >> 8) & 255] += 1
        counts[2][(word >> 16) & 255] += 1
        counts[3][(word >> 24) & 255] += 1
        counts[0][(word >> 32) & 255] += 1
        counts[1][(word >> 40) & 255] += 1
        counts[2][(word >> 48) & 255] += 1
        counts[3][word >> 56] += 1
        i += 8
    while i < n:
        counts[0][data[i]] += 1
        i += 1
    for i in range(256):
        code.counts[i] = counts[0][i] + counts[1][i] + counts[2][i] + counts[3][i]
    memset(&code.counts[256], 0, (LITERALS - 256) * 4)
    if make_code(code) + 8 * 64 >= 8 * <uint64_t>n:
        put_stored(bits, data, n)
        return
    keep_code(kept)
    put_header(bits, kept)
    put_bytes(bits, data, n, code.entries)
    if n >= KEPT_FROM:
        kept.left, kept.n, kept.size = KEPT_FOR, n, bits.at - begin


cdef inline bint put_coded_tokens(Bits* bits, const uint16_t* tokens, size_t n, const KeptCode* kept) noexcept nogil:
    """Write runs as a block with a code; returns whether it has a code for each token, and they take at most 2 bytes each."""
    cdef size_t i
    cdef uint32_t entry, all_entries = 0
    cdef Repetition coded
    cdef const uint32_t* entries = &kept.code.entries[0]
    cdef const uint8_t* limit = bits.at + HEADER_BYTES + 2 * n
    put_header(bits, kept)
    for i in range(n):
        if bits.at > limit:
            return False
        if tokens[i] < 256:
            entry = entries[tokens[i]]
            all_entries |= entry
            put(bits, entry & CODE_BITS, entry >> 16)
            continue
        coded = repetition(tokens[i] - 256)
        entry = entries[coded.symbol]
        all_entries |= entry
        # The code of the distance is a single bit 0.
        put(bits, (entry & CODE_BITS) | <uint64_t>coded.extra << (entry >> 16), (entry >> 16) + coded.n_extra + 1)
    put(bits, entries[END_OF_BLOCK] & CODE_BITS, entries[END_OF_BLOCK] >> 16)
    return not all_entries & UNKNOWN


cdef inline void put_tokens(Bits* bits, const uint16_t* tokens, size_t n, KeptCode* kept) noexcept nogil:
    """Write runs as a block, with a kept code or a new one. A token is a byte, or 256 plus the length of a repetition."""
    cdef Bits before = bits[0]
    cdef Code* code = &kept.code
    cdef size_t i
    if kept.left:
        if put_coded_tokens(bits, tokens, n, kept) and is_alike((bits.at - before.at) * kept.n, kept.size * n, RUNS_CHANGE):
            kept.left -= 1
            return
        bits[0] = before
    memset(code.counts, 0, sizeof(code.counts))
    for i in range(n):
        code.counts[tokens[i] if tokens[i] < 256 else repetition(tokens[i] - 256).symbol] += 1
    make_code(code)
    keep_code(kept)
    put_coded_tokens(bits, tokens, n, kept)
    kept.left, kept.n, kept.size = KEPT_FOR, n, bits.at - before.at


cdef inline uint16_t* put_run(uint16_t* tokens, uint8_t value, size_t n) noexcept nogil:
    tokens[0] = value
    tokens += 1
    n -= 1
    while n >= 3:
        tokens[0] = <uint16_t>(256 + min(n, <size_t>LONGEST))
        n -= tokens[0] - 256
        tokens += 1
    while n:
        tokens[0] = value
        tokens += 1
        n -= 1
    return tokens


cdef inline bint is_steady(const uint8_t* data, size_t n) noexcept nogil:
    """Whether the bytes of SAMPLES samples have long runs."""
    cdef size_t sample, i, k, seen = 0, changes = 0
    for sample in range(<size_t>SAMPLES):
        i = 1 + (n - 1) * sample // SAMPLES
        for k in range(i, min(i + <size_t>SAMPLE, n)):
            changes += data[k] != data[k - 1]
            seen += 1
    return 8 * changes <= seen


cdef inline bint is_random(const uint8_t* data, size_t n) noexcept nogil:
    """Whether a code would gain little: pairs of equal bytes in a sample are nearly as rare as in random bytes."""
    cdef uint32_t[256] counts
    cdef size_t i = 0, step = (n // (16 * <size_t>SAMPLE)) | 1, seen = 0
    cdef uint64_t pairs = 0
    memset(counts, 0, sizeof(counts))
    while i < n:
        pairs += counts[data[i]]
        counts[data[i]] += 1
        seen += 1
        i += step
    return seen >= 8 * SAMPLE and pairs * 2 * 200 < seen * (seen - 1)


cdef inline void add_run(uint64_t* a, uint64_t* b, uint8_t value, size_t n) noexcept nogil:
    """Add a run to the checksum's sums. 64 bits hold the sums of a plane that begins with less than 2^16 in both."""
    b[0] += n * a[0] + value * ((<uint64_t>n * (n + 1)) >> 1)
    a[0] += <uint64_t>value * n


cdef inline uint16_t* tokens_of(
    const uint8_t* data, size_t n, uint16_t* tokens, const uint16_t* end, uint32_t* adler
) noexcept nogil:
    """Find the runs of a plane and update the checksum. Returns the end of the tokens, or NULL for too many runs."""
    cdef uint64_t a = adler[0] & 0xFFFF, b = adler[0] >> 16
    cdef size_t start = 0, i = 1, k
    cdef uint64_t every = data[0] * <uint64_t>0x0101010101010101
    cdef uint64_t word, differs
    while i < n:
        if i + 64 <= n:
            differs = 0
            for k in range(8):
                memcpy(&word, data + i + 8 * k, 8)
                differs |= word ^ every
            if not differs:
                i += 64
                continue
        if i + 8 <= n:
            memcpy(&word, data + i, 8)
            differs = word ^ every
            if not differs:
                i += 8
                continue
            i += lowest_byte(differs)
        elif data[i] == data[start]:
            i += 1
            continue
        add_run(&a, &b, data[start], i - start)
        tokens = put_run(tokens, data[start], i - start)
        if tokens > end:
            return NULL
        start = i
        every = data[i] * <uint64_t>0x0101010101010101
        i += 1
    add_run(&a, &b, data[start], n - start)
    adler[0] = <uint32_t>(b % 65521 << 16 | a % 65521)
    return put_run(tokens, data[start], n - start)


# All planes

cdef inline size_t tokens_room(size_t planes, size_t n) noexcept nogil:
    """Return the maximum number of tokens of all planes, if no plane has much more than n / 2."""
    return planes * (n // 2 + n // LONGEST + 64)


cdef inline size_t deflated_most(size_t planes, size_t n) noexcept nogil:
    """Return the maximum number of bytes that deflate() writes, including those that put() writes after the end."""
    # A stored plane; a steady plane has fewer tokens than half its bytes, of at most 2 bytes each. A code takes 300 bytes.
    # And n bytes for a plane that is written with a kept code and discarded: MOST_BITS bits a byte are less than 2 bytes.
    return planes * (n + 5 * (n // STORED_MOST + 1) + n // LONGEST * 2 + 512) + n + 64


cdef inline uint32_t adler32(uint32_t start, const uint8_t* data, size_t n) noexcept nogil:
    """Continue the checksum of the zlib format (RFC 1950, 8.2), 16 bytes at a time."""
    cdef uint32_t a = start & 0xFFFF, b = start >> 16
    cdef uint32_t[16] sums
    cdef uint32_t[16] sums_of_sums
    cdef uint32_t i, j, rows
    while n:
        rows = <uint32_t>(min(n, <size_t>ADLER_PIECE) // 16)
        memset(sums, 0, sizeof(sums))
        memset(sums_of_sums, 0, sizeof(sums_of_sums))
        add_lanes(data, rows, sums, sums_of_sums)
        data += 16 * rows
        b += 16 * rows * a
        for j in range(16):
            b = (b + 16 * sums_of_sums[j] + (16 - j) * sums[j]) % 65521
            a += sums[j]
        a %= 65521
        n -= 16 * rows
        if n < 16:
            for i in range(<uint32_t>n):
                a = (a + data[i]) % 65521
                b = (b + a) % 65521
            n = 0
    return b << 16 | a


cdef inline size_t deflate(
    const uint8_t* data, size_t planes, size_t n, size_t stride, uint16_t* tokens, KeptCode* kept, uint8_t* out
) noexcept nogil:
    """Deflate `planes` planes of n bytes each (1 or more), `stride` bytes apart, into the zlib format. Returns its length.

    `tokens` has room for tokens_room() tokens, `out` for deflated_most() bytes, `kept` for a code of each plane, of which `left`
    is 0 at first. The code of consecutive planes with long runs is kept at the first one.
    """
    cdef Bits bits
    cdef uint32_t adler = 1, i
    cdef size_t plane, first = 0
    cdef uint16_t* end = tokens
    cdef uint16_t* following
    bits.at = out
    bits.pending = bits.n = 0
    put(&bits, 0x0178, 16)
    for plane in range(planes):
        following = tokens_of(data, n, end, end + n // 2, &adler) if is_steady(data, n) else NULL
        if following != NULL:
            first = first if end > tokens else plane
            end = following
        else:
            if end > tokens:
                put_tokens(&bits, tokens, end - tokens, &kept[first])
                end = tokens
            put_plane(&bits, data, n, &kept[plane])
            adler = adler32(adler, data, n)
        data += stride
    if end > tokens:
        put_tokens(&bits, tokens, end - tokens, &kept[first])
    put(&bits, 3, 10)                       # an empty last block
    put(&bits, 0, (8 - bits.n) & 7)
    for i in range(4):
        put(&bits, (adler >> (24 - 8 * i)) & 255, 8)
    return bits.at - out
