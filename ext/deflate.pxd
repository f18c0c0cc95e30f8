# Deflate (RFC 1951) of byte planes: what HDF5's shuffle filter makes of rows, one plane after the other, each as what it is.
#
# Most planes of a chunk of rows stay the same for long: runs, coded as a byte and its repetition (planes of that kind that
# follow each other share a block). The others change from row to row: a Huffman code of their own, and where that gains
# nothing (the lowest bytes of times) the bytes as they are. Nothing is searched for: on such rows a search for repetitions
# costs twice the time, and with one code for several planes the result is larger by a fifth.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #define lowest_byte(x) (__builtin_ctzll(x) >> 3)
    #define highest_bit(x) (63 - __builtin_clzll(x))
    static const uint8_t order_of_lengths[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    static const uint32_t gaps_of_sorting[5] = {57, 23, 10, 4, 1};
    """
    int lowest_byte(uint64_t x) noexcept nogil
    int highest_bit(uint64_t x) noexcept nogil
    const uint8_t[19] order_of_lengths
    const uint32_t[5] gaps_of_sorting

cdef enum:
    LITERALS = 286             # bytes, the block's end, lengths
    END_OF_BLOCK = 256
    LONGEST = 258              # of a repetition
    # Four codes of at most so many bits, and what is left of a byte, fit into 64 bits.
    MOST_BITS = 14
    CODE_LENGTHS = 19
    CODE_LENGTH_BITS = 7
    STORED_MOST = 65535        # of a block of bytes as they are
    SAMPLES = 8                # places of a plane by which it is judged
    SAMPLE = 64                # bytes of each
    ADLER_PIECE = 5504         # bytes (a multiple of 16) after which its sums are reduced at the latest: 32 bits hold them

cdef struct Bits:
    uint8_t* at
    uint64_t waiting
    uint32_t n                 # of them, below 8 between two calls

cdef struct Code:
    uint32_t n                 # symbols, up to the last that is used
    uint32_t counts[LITERALS]
    uint8_t lengths[LITERALS]
    uint32_t entries[LITERALS] # the code's bits, the first one lowest, and above 16 bits how many

cdef struct Repetition:
    uint32_t symbol            # of its length
    uint32_t extra             # the bits that go with it
    uint32_t n_extra           # how many


cdef inline void put(Bits* bits, uint64_t value, uint32_t n) noexcept nogil:
    """Up to 56 bits, the lowest one first. Writes 8 bytes, most of which are written over by what follows."""
    bits.waiting |= value << bits.n
    bits.n += n
    memcpy(bits.at, &bits.waiting, 8)
    bits.at += bits.n >> 3
    bits.waiting >>= bits.n & 56
    bits.n &= 7


# A code

cdef inline void lengths_of(const uint32_t* counts, uint32_t n, uint32_t most, uint8_t* lengths) noexcept nogil:
    """The lengths of a Huffman code for n symbols that occur so often, none of more than `most` bits; 0: never occurs."""
    cdef uint64_t[LITERALS] leaves      # how often, and which symbol below
    cdef uint64_t[LITERALS] inner       # how often what is below an inner node occurs
    cdef uint16_t[2 * LITERALS] parent  # of leaves, then of inner nodes
    cdef uint16_t[LITERALS] depth       # of inner nodes
    cdef uint32_t[64] of_length
    cdef uint32_t used = 0, i, j, k, gap, leaf, node, made, length
    cdef uint64_t one, total
    for i in range(n):
        lengths[i] = 0
        if counts[i]:
            leaves[used] = (<uint64_t>counts[i] << 16) | i
            used += 1
    if used < 2:
        for i in range(used):
            lengths[leaves[i] & 0xFFFF] = 1
        return
    for k in range(5):                      # Shell's sort: cheap for some hundred, and most are nearly sorted
        gap = gaps_of_sorting[k]
        for i in range(gap, used):
            one = leaves[i]
            j = i
            while j >= gap and leaves[j - gap] > one:
                leaves[j] = leaves[j - gap]
                j -= gap
            leaves[j] = one
    # Inner nodes are made in the order of their counts, so the two smallest are at the front of one row or the other.
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
    # What was cut to `most` bits takes too many codes: a shorter one becomes two that are longer by a bit, and takes one of
    # them in, until they fit.
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
    for length in range(most, 0, -1):       # the rarest get the longest
        for j in range(of_length[length]):
            lengths[leaves[i] & 0xFFFF] = length
            i += 1


cdef inline void entries_of(const uint8_t* lengths, uint32_t n, uint32_t* entries) noexcept nogil:
    """The canonical code of these lengths (RFC 1951, 3.2.2)."""
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
    """From the counts all else; the bits that a block coded with it takes, without the description of the code."""
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
    """The header of a block with a code of its own; the only distance is 1."""
    cdef uint8_t[LITERALS + 1] told
    cdef uint8_t[LITERALS + 1] symbols
    cdef uint8_t[LITERALS + 1] extra
    cdef uint32_t[CODE_LENGTHS] counts
    cdef uint8_t[CODE_LENGTHS] lengths
    cdef uint32_t[CODE_LENGTHS] entries
    cdef uint32_t i, n = 0, at = 0, run, some, entry
    entries_of(code.lengths, code.n, code.entries)
    memcpy(told, code.lengths, code.n)
    told[code.n] = 1                        # of distance 1
    memset(counts, 0, sizeof(counts))
    while at < code.n + 1:
        run = 1
        while at + run < code.n + 1 and told[at + run] == told[at]:
            run += 1
        if told[at] == 0 and run >= 3:
            some = min(run, <uint32_t>138)
            symbols[n] = 18 if some > 10 else 17
            extra[n] = <uint8_t>(some - (11 if some > 10 else 3))
        elif at and told[at] == told[at - 1] and run >= 3:
            some = min(run, <uint32_t>6)
            symbols[n] = 16
            extra[n] = <uint8_t>(some - 3)
        else:
            some = 1
            symbols[n] = told[at]
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
    """Of the byte before, so many times: 3 to LONGEST (RFC 1951, 3.2.5)."""
    cdef Repetition found
    cdef uint32_t beyond = length - 3
    if length == LONGEST or beyond < 8:
        found.symbol = LITERALS - 1 if length == LONGEST else 257 + beyond
        found.extra = found.n_extra = 0
        return found
    found.n_extra = highest_bit(beyond) - 2
    found.symbol = 257 + 4 * found.n_extra + (beyond >> found.n_extra)
    found.extra = beyond & ((<uint32_t>1 << found.n_extra) - 1)
    return found


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


cdef inline void put_bytes(Bits* bits, const uint8_t* data, size_t n, const uint32_t* entries) noexcept nogil:
    cdef uint32_t a, b, c, d
    cdef uint64_t low, high
    cdef size_t i = 0
    while i + 4 <= n:
        a = entries[data[i]]
        b = entries[data[i + 1]]
        c = entries[data[i + 2]]
        d = entries[data[i + 3]]
        low = (a & 0xFFFF) | <uint64_t>(b & 0xFFFF) << (a >> 16)
        high = (c & 0xFFFF) | <uint64_t>(d & 0xFFFF) << (c >> 16)
        a = (a >> 16) + (b >> 16)
        put(bits, low | high << a, a + (c >> 16) + (d >> 16))
        i += 4
    while i < n:
        put(bits, entries[data[i]] & 0xFFFF, entries[data[i]] >> 16)
        i += 1


cdef inline void put_plane(Bits* bits, const uint8_t* data, size_t n, Code* code) noexcept nogil:
    """A plane whose bytes change: with a code of its own, or as it is."""
    cdef uint32_t[4][256] counts
    cdef size_t i
    cdef uint64_t word
    if is_random(data, n):
        put_stored(bits, data, n)
        return
    memset(counts, 0, sizeof(counts))
    i = 0
    while i + 8 <= n:
        # Four tables: a byte that comes again waits for its count to be written otherwise.
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
    put_code(bits, code)
    put_bytes(bits, data, n, code.entries)
    put(bits, code.entries[END_OF_BLOCK] & 0xFFFF, code.entries[END_OF_BLOCK] >> 16)


cdef inline void put_tokens(Bits* bits, const uint16_t* tokens, size_t n, Code* code) noexcept nogil:
    """Runs: bytes, and above 256 the lengths of their repetitions."""
    cdef size_t i
    cdef uint32_t entry
    cdef Repetition one
    memset(code.counts, 0, sizeof(code.counts))
    for i in range(n):
        code.counts[tokens[i] if tokens[i] < 256 else repetition(tokens[i] - 256).symbol] += 1
    make_code(code)
    put_code(bits, code)
    for i in range(n):
        if tokens[i] < 256:
            put(bits, code.entries[tokens[i]] & 0xFFFF, code.entries[tokens[i]] >> 16)
            continue
        one = repetition(tokens[i] - 256)
        entry = code.entries[one.symbol]
        # The distance's code is the one bit 0.
        put(bits, (entry & 0xFFFF) | <uint64_t>one.extra << (entry >> 16), (entry >> 16) + one.n_extra + 1)
    put(bits, code.entries[END_OF_BLOCK] & 0xFFFF, code.entries[END_OF_BLOCK] >> 16)


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
    """Whether the bytes stay the same for long, by a look at some of them."""
    cdef size_t place, i, k, seen = 0, found = 0
    for place in range(<size_t>SAMPLES):
        i = 1 + (n - 1) * place // SAMPLES
        for k in range(i, min(i + <size_t>SAMPLE, n)):
            found += data[k] != data[k - 1]
            seen += 1
    return 8 * found <= seen


cdef inline bint is_random(const uint8_t* data, size_t n) noexcept nogil:
    """Whether no code would gain much: two of some bytes are the same as seldom as if all values were as frequent."""
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
    """A run, for the checksum: 64 bits hold the sums of a plane that begins with less than 2^16 in both."""
    b[0] += n * a[0] + value * ((<uint64_t>n * (n + 1)) >> 1)
    a[0] += <uint64_t>value * n


cdef inline uint16_t* tokens_of(
    const uint8_t* data, size_t n, uint16_t* tokens, const uint16_t* end, uint32_t* adler
) noexcept nogil:
    """The runs of a plane, and its checksum; NULL: there are too many."""
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


# The whole

cdef inline size_t tokens_room(size_t planes, size_t n) noexcept nogil:
    """Tokens that the runs of all planes take at most, as long as no plane has more than n / 2 and a little."""
    return planes * (n // 2 + n // LONGEST + 64)


cdef inline size_t deflated_most(size_t planes, size_t n) noexcept nogil:
    """Bytes that deflate() writes at most, those behind the end that it writes over included."""
    # A plane as it is; a steady one has fewer tokens than half its bytes, of 2 bytes at most each. A code takes 300 bytes.
    return planes * (n + 5 * (n // STORED_MOST + 1) + n // LONGEST * 2 + 512) + 64


cdef inline uint32_t adler32(uint32_t start, const uint8_t* data, size_t n) noexcept nogil:
    """The checksum of the zlib format (RFC 1950, 8.2), 16 bytes at a time."""
    cdef uint32_t a = start & 0xFFFF, b = start >> 16
    cdef uint32_t[16] sums
    cdef uint32_t[16] sums_of_sums
    cdef uint32_t i, j, rows
    while n:
        rows = <uint32_t>(min(n, <size_t>ADLER_PIECE) // 16)
        memset(sums, 0, sizeof(sums))
        memset(sums_of_sums, 0, sizeof(sums_of_sums))
        for i in range(rows):
            for j in range(16):
                sums_of_sums[j] += sums[j]
                sums[j] += data[j]
            data += 16
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
    const uint8_t* data, size_t planes, size_t n, size_t stride, uint16_t* tokens, uint8_t* out
) noexcept nogil:
    """`planes` planes of n bytes each (1 or more), `stride` bytes apart, in the zlib format; returns its length.

    tokens: room for tokens_room() of them; out: room for deflated_most() bytes.
    """
    cdef Bits bits
    cdef Code code
    cdef uint32_t adler = 1, i
    cdef size_t plane
    cdef uint16_t* end = tokens
    cdef uint16_t* following
    bits.at = out
    bits.waiting = bits.n = 0
    put(&bits, 0x0178, 16)
    for plane in range(planes):
        following = tokens_of(data, n, end, end + n // 2, &adler) if is_steady(data, n) else NULL
        if following != NULL:
            end = following
        else:
            if end > tokens:
                put_tokens(&bits, tokens, end - tokens, &code)
                end = tokens
            put_plane(&bits, data, n, &code)
            adler = adler32(adler, data, n)
        data += stride
    if end > tokens:
        put_tokens(&bits, tokens, end - tokens, &code)
    put(&bits, 3, 10)                       # an empty last block
    put(&bits, 0, (8 - bits.n) & 7)
    for i in range(4):
        put(&bits, (adler >> (24 - 8 * i)) & 255, 8)
    return bits.at - out
