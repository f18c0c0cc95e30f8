# Decode words into rows and encode rows as words, for every layout: one function, specialised by the type of the row.
# Bit positions are those of the chips' data sheets: bit 0 comes first on the line and is the lowest bit of byte 0.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, UINT32_MAX
from libc.string cimport memcpy, memset

from row_structs cimport Row10, Row24, Row24Clock64, Row30, V1, V2_DIAGNOSTICS

ctypedef fused Row:
    Row10
    Row24
    Row24Clock64
    Row30

cdef extern from *:
    int odd_parity "__builtin_parityll"(unsigned long long) noexcept nogil
    bint expect "__builtin_expect"(bint value, bint expected) noexcept nogil

cdef enum Reason:                    # schema.REASONS; a kernel returns it negated in place of a row
    UNKNOWN_TYPE = 1
    WIDE_CHANNEL = 2
    INVALID_PACKET_TYPE = 3
    WIDE_RECEIPT = 4

cdef enum RowType:                   # schema.PacketType
    CONFIG_WRITE = 2
    CONFIG_READ = 3
    TIMESTAMP = 4
    SYNC = 6
    TRIGGER = 7


cdef inline uint64_t load64(const uint8_t* at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return value


cdef inline uint32_t load32(const uint8_t* at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, 4)
    return value


cdef inline uint64_t bits(uint64_t word, int low, int width) noexcept nogil:
    return (word >> low) & ((<uint64_t>1 << width) - 1)


cdef inline uint64_t with_odd_parity(uint64_t word, int bit) noexcept nogil:
    """Set bit `bit` of the word, where it is 0, so that the number of ones is odd."""
    return word | (<uint64_t>odd_parity(word) ^ 1) << bit


cdef inline uint64_t word_mask(int asic) noexcept nogil:
    return (<uint64_t>1 << 54) - 1 if asic == V1 else ~<uint64_t>0


# Chip keys: "io_group-io_channel-chip_id", at most 11 characters, the rest zeros.

cdef inline char* put_number(char* at, uint8_t number) noexcept nogil:
    if number >= 100:
        at[0] = <char>(c'0' + number // 100)
        at += 1
    if number >= 10:
        at[0] = <char>(c'0' + number // 10 % 10)
        at += 1
    at[0] = <char>(c'0' + number % 10)
    return at + 1


cdef inline void put_key(char* key, uint8_t io_group, uint8_t io_channel, uint8_t chip_id) noexcept nogil:
    cdef char* at
    memset(key, 0, 32)
    at = put_number(key, io_group)
    at[0] = c'-'
    at = put_number(at + 1, io_channel)
    at[0] = c'-'
    put_number(at + 1, chip_id)


cdef inline uint8_t key_channel(const char* key) noexcept nogil:
    """Return the io_channel of a chip key; 0 when the key has another form (other programs leave it empty)."""
    cdef int i = 0, number = 0
    while i < 32 and key[i] != c'-':
        i += 1
    i += 1
    while i < 32 and c'0' <= key[i] <= c'9' and number < 256:
        number = 10 * number + (key[i] - c'0')
        i += 1
    return <uint8_t>number if i < 32 and key[i] == c'-' and number < 256 else 0


cdef inline int word_row(
    Row* row, uint64_t word, int asic, uint8_t io_group, uint8_t io_channel, uint64_t receipt, uint8_t direction
) noexcept nogil:
    """Fill every column from the bits of the word, whatever its type. 0: correct parity, 1: wrong parity, -Reason: no row.

    Special columns: v2 diagnostics: bit 46, which has no column, is the lowest of `counter`; v3: bit 43 is the highest of
    the 28-bit `timestamp` and also `first_packet` (a chip uses it as either), the four bits 61..58 (FIFO flags or tally)
    are `local_fifo` and `shared_fifo`. Layout 1.0 has no column for the receipt timestamp.
    """
    cdef int odd
    if Row is Row10:
        word &= (<uint64_t>1 << 54) - 1
        odd = odd_parity(word)
        put_key(row.chip_key, io_group, io_channel, <uint8_t>bits(word, 2, 8))
        row.type = <uint8_t>bits(word, 0, 2)
        row.chipid = <uint8_t>bits(word, 2, 8)
        row.parity = <uint8_t>bits(word, 53, 1)
        row.valid_parity = <uint8_t>odd
        row.channel = <uint8_t>bits(word, 10, 7)
        row.timestamp = bits(word, 17, 24)
        row.adc_counts = <uint16_t>bits(word, 41, 10)
        row.fifo_half = <uint8_t>bits(word, 51, 1)
        row.fifo_full = <uint8_t>bits(word, 52, 1)
        row.register = <uint8_t>bits(word, 10, 8)
        row.value = <uint8_t>bits(word, 18, 8)
        row.counter = <uint32_t>(bits(word, 10, 4) << 12 | bits(word, 41, 12))
        row.direction = direction
        return 1 - odd
    else:
        odd = odd_parity(word)
        if Row is Row30:
            if word & 3 == 0:
                return -INVALID_PACKET_TYPE
        elif Row is Row24:
            if receipt > UINT32_MAX:
                return -WIDE_RECEIPT
        row.io_group = io_group
        row.io_channel = io_channel
        row.chip_id = <uint8_t>bits(word, 2, 8)
        row.packet_type = <uint8_t>bits(word, 0, 2)
        row.downstream_marker = <uint8_t>bits(word, 62, 1)
        row.parity = <uint8_t>bits(word, 63, 1)
        row.valid_parity = <uint8_t>odd
        row.channel_id = <uint8_t>bits(word, 10, 6)
        row.trigger_type = <uint8_t>bits(word, 56, 2)
        row.local_fifo = <uint8_t>bits(word, 58, 2)
        row.shared_fifo = <uint8_t>bits(word, 60, 2)
        row.register_address = <uint8_t>bits(word, 10, 8)
        row.register_data = <uint8_t>bits(word, 18, 8)
        row.direction = direction
        row.local_fifo_events = 0
        row.shared_fifo_events = 0
        row.counter = 0
        row.fifo_diagnostics_enabled = 0
        if Row is Row30:
            row.timestamp = bits(word, 16, 28)
            row.first_packet = <uint8_t>bits(word, 43, 1)
            row.reset_sample_flag = <uint8_t>bits(word, 44, 1)
            row.cds_flag = <uint8_t>bits(word, 45, 1)
            row.dataword = <uint16_t>bits(word, 46, 10)
        else:
            row.timestamp = bits(word, 16, 31)
            row.first_packet = <uint8_t>bits(word, 47, 1)
            row.dataword = <uint8_t>bits(word, 48, 8)
            if asic == V2_DIAGNOSTICS:
                row.timestamp = bits(word, 16, 16)
                row.shared_fifo_events = <uint16_t>bits(word, 32, 12)
                row.local_fifo_events = <uint8_t>bits(word, 44, 2)
                row.counter = <uint32_t>bits(word, 46, 1)
                row.fifo_diagnostics_enabled = 1
        if Row is Row24:
            row.receipt_timestamp = <uint32_t>receipt
        else:
            row.receipt_timestamp = receipt
        return 1 - odd


cdef inline int row_type(const Row* row) noexcept nogil:
    if Row is Row10:
        return row.type
    else:
        return row.packet_type


cdef inline uint64_t row_word(const Row* row, int asic) noexcept nogil:
    """Encode a row of types 0 to 3 as its word, the inverse of word_row; every column is cut to the width of its field.

    Columns that share bits are joined with OR, because older files of larpix-control fill only those of the type.
    """
    cdef uint64_t word
    if Row is Row10:
        word = (
            (row.type & 3) | <uint64_t>row.chipid << 2 | <uint64_t>(row.channel & 0x7f) << 10
            | bits(row.timestamp, 0, 24) << 17 | <uint64_t>(row.adc_counts & 0x3ff) << 41
            | <uint64_t>(row.fifo_half & 1) << 51 | <uint64_t>(row.fifo_full & 1) << 52
            | <uint64_t>(row.parity & 1) << 53
        )
        if row.type == 1:
            word |= bits(row.counter, 12, 4) << 10 | bits(row.counter, 0, 12) << 41
        elif row.type >= CONFIG_WRITE:
            word |= <uint64_t>row.register << 10 | <uint64_t>row.value << 18
        return word
    else:
        word = (
            (row.packet_type & 3) | <uint64_t>row.chip_id << 2 | <uint64_t>(row.channel_id & 0x3f) << 10
            | <uint64_t>(row.trigger_type & 3) << 56 | <uint64_t>(row.local_fifo & 3) << 58
            | <uint64_t>(row.shared_fifo & 3) << 60 | <uint64_t>(row.downstream_marker & 1) << 62
            | <uint64_t>(row.parity & 1) << 63
        )
        if row.packet_type >= CONFIG_WRITE:
            word |= <uint64_t>row.register_address << 10 | <uint64_t>row.register_data << 18
        if Row is Row30:
            word |= (
                bits(row.timestamp, 0, 28) << 16 | <uint64_t>(row.first_packet & 1) << 43
                | <uint64_t>(row.reset_sample_flag & 1) << 44 | <uint64_t>(row.cds_flag & 1) << 45
                | <uint64_t>(row.dataword & 0x3ff) << 46
            )
        else:
            word |= <uint64_t>(row.first_packet & 1) << 47 | <uint64_t>row.dataword << 48
            if asic == V2_DIAGNOSTICS:
                word |= (
                    bits(row.timestamp, 0, 16) << 16 | <uint64_t>(row.shared_fifo_events & 0xfff) << 32
                    | <uint64_t>(row.local_fifo_events & 3) << 44 | <uint64_t>(row.counter & 1) << 46
                )
            else:
                word |= bits(row.timestamp, 0, 31) << 16
        return word


cdef inline void time_row(Row* row, uint8_t io_group, uint64_t seconds) noexcept nogil:
    """Fill a row of type 4: unix seconds of a board's header, or of the host. Layout 1.0 has the io_group in the key."""
    memset(row, 0, sizeof(Row))
    row.timestamp = seconds
    if Row is Row10:
        put_key(row.chip_key, io_group, 0, 0)
        row.type = TIMESTAMP
    else:
        row.io_group = io_group
        row.packet_type = TIMESTAMP


cdef inline void board_row(
    Row* row, uint8_t kind, uint8_t io_group, uint8_t detail, uint8_t source, uint32_t status, uint64_t timestamp
) noexcept nogil:
    """Fill a row of type SYNC or TRIGGER. Layout 1.0 has `register` and `value` for trigger_type and dataword."""
    memset(row, 0, sizeof(Row))
    row.timestamp = timestamp
    row.counter = status
    row.direction = 1
    if Row is Row10:
        put_key(row.chip_key, io_group, 0, 0)
        row.type = kind
        row.register = detail
        row.value = source
    else:
        row.io_group = io_group
        row.packet_type = kind
        row.trigger_type = detail
        row.dataword = source
