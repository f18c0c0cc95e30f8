# Layouts as packed structs and the ledger's counters, shared by every kernel; pure C, no Python objects.
# The structs are those of larpixdaq/schema.py, whose dtypes a memoryview `Row24[::1]` checks at every call.
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

cdef enum:                           # schema.COUNTS, in its order; without a name: Cython takes no named enum as index in +=
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
