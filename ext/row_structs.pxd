# Layouts of rows as packed structs, the ledger's counters, and the check of Python arrays against them: shared by all kernels.
# The structs are those of larpixdaq/schema.py; a memoryview such as `Row24[::1]` checks their dtypes at every call.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef packed struct Row10:            # layout 1.0, v1 chips, 56 bytes
    char chip_key[32]
    uint8_t type
    uint8_t chipid
    uint8_t parity
    uint8_t valid_parity
    uint8_t channel
    uint64_t timestamp
    uint16_t adc_counts
    uint8_t fifo_half
    uint8_t fifo_full
    uint8_t register
    uint8_t value
    uint32_t counter
    uint8_t direction

cdef packed struct Row24:            # layout 2.4, v2 chips, 36 bytes
    uint8_t io_group
    uint8_t io_channel
    uint8_t chip_id
    uint8_t packet_type
    uint8_t downstream_marker
    uint8_t parity
    uint8_t valid_parity
    uint8_t channel_id
    uint64_t timestamp
    uint8_t dataword
    uint8_t trigger_type
    uint8_t local_fifo
    uint8_t shared_fifo
    uint8_t register_address
    uint8_t register_data
    uint8_t direction
    uint8_t local_fifo_events
    uint16_t shared_fifo_events
    uint32_t counter
    uint8_t fifo_diagnostics_enabled
    uint8_t first_packet
    uint32_t receipt_timestamp

cdef packed struct Row24Clock64:     # layout 2.4-clock64, 40 bytes
    uint8_t io_group
    uint8_t io_channel
    uint8_t chip_id
    uint8_t packet_type
    uint8_t downstream_marker
    uint8_t parity
    uint8_t valid_parity
    uint8_t channel_id
    uint64_t timestamp
    uint8_t dataword
    uint8_t trigger_type
    uint8_t local_fifo
    uint8_t shared_fifo
    uint8_t register_address
    uint8_t register_data
    uint8_t direction
    uint8_t local_fifo_events
    uint16_t shared_fifo_events
    uint32_t counter
    uint8_t fifo_diagnostics_enabled
    uint8_t first_packet
    uint64_t receipt_timestamp

cdef packed struct Row30:            # layout 3.0, v3 chips, 43 bytes
    uint8_t io_group
    uint8_t io_channel
    uint8_t chip_id
    uint8_t packet_type
    uint8_t downstream_marker
    uint8_t parity
    uint8_t valid_parity
    uint8_t channel_id
    uint64_t timestamp
    uint16_t dataword
    uint8_t trigger_type
    uint8_t local_fifo
    uint8_t shared_fifo
    uint8_t register_address
    uint8_t register_data
    uint8_t direction
    uint8_t local_fifo_events
    uint16_t shared_fifo_events
    uint32_t counter
    uint8_t fifo_diagnostics_enabled
    uint8_t first_packet
    uint64_t receipt_timestamp
    uint8_t reset_sample_flag
    uint8_t cds_flag

cdef packed struct Span:             # schema.SPAN
    uint32_t start
    uint32_t length

cdef packed struct UnknownWord:      # schema.UNKNOWN_WORD
    uint64_t seconds
    uint8_t io_group
    uint8_t reason
    uint8_t size
    uint8_t raw[24]

cdef enum:                           # constants.Count, in its order; without a name: Cython takes no named enum as index in +=
    MESSAGES
    BYTES_IN
    HEADER_BYTES
    TRAILING_BYTES
    REJECTED_BYTES
    RESYNC_BYTES
    PENDING_BEFORE
    PENDING_AFTER
    WORDS_IN
    WORD_BYTES
    WORD_ROWS
    UNKNOWN_WORDS
    REJECTED_WORDS
    PACKETS
    BAD_PARITY
    TIME_ROWS
    REJECTED_MESSAGES
    WRONG_COUNTS
    INFO_ROWS
    SENT_ROWS
    DROPPED
    STORED
    N_COUNTS

cdef enum Asic:                      # schema.Asic
    V1 = 1
    V2 = 2
    V2_DIAGNOSTICS = 3
    V3 = 4

# Rows of a Python array: the only place where their dtype is checked against the structs.

cdef enum Kind:
    KIND10
    KIND24
    KIND24_CLOCK64
    KIND30

cdef struct Rows:
    void* at
    Py_ssize_t n
    Kind kind


cdef inline int checked_asic(object asic) except -1:
    if asic not in (V1, V2, V2_DIAGNOSTICS, V3):
        raise ValueError(f"asic: expected a code of schema.Asic, 1 to 4, found {asic!r}")
    return asic


cdef inline uint8_t checked_byte(str name, object value) except? 0:
    if not 0 <= value <= 255:
        raise ValueError(f"{name}: expected 0 to 255, found {value!r}")
    return value


cdef inline Rows open_rows(object rows, int asic, bint writable) except *:
    """Return a pointer to the rows, which is valid as long as the caller holds `rows`."""
    cdef Rows out
    cdef const Row10[::1] rows10
    cdef const Row24[::1] rows24
    cdef const Row24Clock64[::1] rows24_clock64
    cdef const Row30[::1] rows30
    given = memoryview(rows)
    if asic == V1:
        sizes = (sizeof(Row10),)
    elif asic == V3:
        sizes = (sizeof(Row30),)
    else:
        sizes = (sizeof(Row24), sizeof(Row24Clock64))
    if given.ndim != 1 or given.itemsize not in sizes:
        wanted = " or ".join(map(str, sizes))
        raise ValueError(
            f"rows for asic {asic}: expected one dimension and {wanted} bytes a row (schema.layout_of), "
            f"found {given.ndim} and {given.itemsize}"
        )
    if writable and given.readonly:
        raise ValueError("rows: expected a writable array, found a read-only one")
    out.at = NULL
    out.n = len(given)
    try:
        if asic == V1:
            out.kind = KIND10
            rows10 = rows
            if out.n:
                out.at = <void*>&rows10[0]
        elif asic == V3:
            out.kind = KIND30
            rows30 = rows
            if out.n:
                out.at = <void*>&rows30[0]
        elif given.itemsize == sizeof(Row24):
            out.kind = KIND24
            rows24 = rows
            if out.n:
                out.at = <void*>&rows24[0]
        else:
            out.kind = KIND24_CLOCK64
            rows24_clock64 = rows
            if out.n:
                out.at = <void*>&rows24_clock64[0]
    except ValueError as error:
        raise ValueError(f"rows for asic {asic}: expected contiguous rows of its layout (schema.layout_of): {error}") from None
    return out
