"""Count the rows of a run per chip and channel, with ADC histograms, parity and FIFO flags.

A data row without errors costs four additions: rows of its type (once for consecutive rows of a type), packets and sum of ADC
values of its channel, and its ADC bin. Sums per chip, and the data packets of a channel, are made on request. Memory is allocated at the first packet of a chip or channel. The
interface is documented in monitor_counters.pyi.
"""

from libc.math cimport log2f
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

cimport cython
import numpy as np

from row_structs cimport Row10, Row24, Row24Clock64, Row30

ctypedef fused Row2:
    Row24
    Row24Clock64
    Row30

ctypedef fused Number:
    uint32_t
    uint64_t

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void *at, int to_write) noexcept nogil

cdef enum:
    LARGE = 1 << 16               # channels whose counters do not fit a core's caches
    AHEAD = 16                    # rows between the prefetch of a row's channel and its count
    BATCH = 64                    # rows whose ADC bins are prefetched before the first of them is incremented
    FEW = 64                      # numbers of packets whose codes are computed once for all channels of an io_group
    TYPES = 8                     # packet types 0 to 7
    SYNC = 6
    KEYS = 1 << 24                # io_group << 16 | io_channel << 8 | chip_id
    # 16.8 million v2 channels; a link that sends random addresses must not use up the host's memory
    MAX_CHIPS = 1 << 18
    SLAB = 1 << 20                # bytes of histogram memory that are allocated at a time

cdef enum Quantity:               # of channels
    PACKETS
    DATA
    OTHERS

#: Entry of `PacketCounters.chips()`.
CHIPS = np.dtype([
    ("io_group", "u1"), ("io_channel", "u1"), ("chip_id", "u1"),
    ("packets", "<u8"), ("data", "<u8"), ("bad_parity", "<u8"),
    ("local_half", "<u8"), ("local_full", "<u8"), ("shared_half", "<u8"), ("shared_full", "<u8"),
])

cdef packed struct ChipRow:       # CHIPS
    uint8_t io_group
    uint8_t io_channel
    uint8_t chip_id
    uint64_t packets
    uint64_t data
    uint64_t bad_parity
    uint64_t local_half
    uint64_t local_full
    uint64_t shared_half
    uint64_t shared_full

cdef struct Channel:
    uint64_t packets
    uint64_t adc_sum              # of the packets in the histogram
    uint32_t *histogram           # page of the channel, or its chip's `shared` page; NULL before its first data packet

cdef struct Chip:                 # not changed by a data row without errors
    uint32_t key
    uint64_t others               # packets of other types than data
    uint64_t bad_parity
    uint64_t local_half
    uint64_t local_full
    uint64_t shared_half
    uint64_t shared_full
    uint32_t *shared              # histogram of the channels after the limit

cdef struct Table:
    uint32_t *chip_of             # key -> 1 + index of the chip, 0: not seen. 64 MiB of addresses, used only near keys of chips
    Chip *chips
    Channel *channels             # n_channels of each chip
    uint64_t *others              # of each channel: packets of other types than data
    uint64_t *omitted             # of each channel: data packets that are not in the histogram
    uint32_t n_chips
    uint32_t room                 # for chips
    uint32_t n_channels
    uint32_t bins
    uint8_t data_type             # 1 for v3, otherwise 0
    void **slabs
    uint32_t n_slabs
    uint32_t slab_room
    uint32_t page                 # next free page of the last slab
    uint64_t pages                # number of pages that belong to one channel
    uint64_t page_limit
    uint64_t unplaced
    uint64_t types[256][2][TYPES]


cdef uint32_t *new_page(Table *t) noexcept nogil:
    cdef uint32_t pages = SLAB // (t.bins * sizeof(uint32_t))
    cdef void **slabs
    if t.n_slabs == 0 or t.page == pages:
        if t.n_slabs == t.slab_room:
            slabs = <void **>realloc(t.slabs, (2 * t.slab_room + 16) * sizeof(void *))
            if slabs == NULL:
                return NULL
            t.slabs = slabs
            t.slab_room = 2 * t.slab_room + 16
        t.slabs[t.n_slabs] = calloc(SLAB, 1)
        if t.slabs[t.n_slabs] == NULL:
            return NULL
        t.n_slabs += 1
        t.page = 0
    t.page += 1
    return <uint32_t *>t.slabs[t.n_slabs - 1] + <size_t>(t.page - 1) * t.bins


cdef uint32_t add_chip(Table *t, uint32_t key) noexcept nogil:
    """Add a chip. Returns 1 + its index, or 0 without room for more chips."""
    cdef uint32_t room
    cdef Chip *chips
    cdef Channel *channels
    cdef uint64_t *others
    cdef size_t first = <size_t>t.n_chips * t.n_channels
    if t.n_chips == t.room:
        if t.room == MAX_CHIPS:
            return 0
        room = 2 * t.room if t.room else 64
        chips = <Chip *>realloc(t.chips, room * sizeof(Chip))
        if chips == NULL:
            return 0
        t.chips = chips
        channels = <Channel *>realloc(t.channels, <size_t>room * t.n_channels * sizeof(Channel))
        if channels == NULL:
            return 0
        t.channels = channels
        others = <uint64_t *>realloc(t.others, <size_t>room * t.n_channels * sizeof(uint64_t))
        if others == NULL:
            return 0
        t.others = others
        others = <uint64_t *>realloc(t.omitted, <size_t>room * t.n_channels * sizeof(uint64_t))
        if others == NULL:
            return 0
        t.omitted = others
        t.room = room
    memset(&t.chips[t.n_chips], 0, sizeof(Chip))
    memset(&t.channels[first], 0, t.n_channels * sizeof(Channel))
    memset(&t.others[first], 0, t.n_channels * sizeof(uint64_t))
    memset(&t.omitted[first], 0, t.n_channels * sizeof(uint64_t))
    t.chips[t.n_chips].key = key
    t.n_chips += 1
    t.chip_of[key] = t.n_chips
    return t.n_chips


cdef uint32_t *add_histogram(Table *t, Chip *chip, Channel *channel) noexcept nogil:
    """Give a channel its page, or after the limit that of its chip. NULL without memory for either."""
    if t.pages < t.page_limit:
        channel.histogram = new_page(t)
        if channel.histogram != NULL:
            t.pages += 1
            return channel.histogram
    if chip.shared == NULL:
        chip.shared = new_page(t)
    channel.histogram = chip.shared
    return channel.histogram


cdef inline void place(
    Table *t, uint32_t key, uint32_t channel_id, uint32_t adc, bint data, bint in_histogram, bint valid_parity,
    uint32_t local, uint32_t shared
) noexcept nogil:
    """Count a packet. `local` and `shared`: bit 0 for more than half full, bit 1 for full."""
    cdef uint32_t number = t.chip_of[key]
    cdef size_t at
    cdef Channel *channel
    cdef Chip *chip
    cdef uint32_t *histogram
    if channel_id >= t.n_channels or adc >= t.bins:
        t.unplaced += 1
        return
    if number == 0:
        number = add_chip(t, key)
        if number == 0:
            t.unplaced += 1
            return
    at = <size_t>(number - 1) * t.n_channels + channel_id
    channel = &t.channels[at]
    channel.packets += 1
    # One branch for all rare cases.
    if not (data and valid_parity) or (local | shared):
        chip = &t.chips[number - 1]
        if not data:
            chip.others += 1
            t.others[at] += 1
        else:
            chip.local_half += local & 1
            chip.local_full += (local >> 1) & 1
            chip.shared_half += shared & 1
            chip.shared_full += (shared >> 1) & 1
        chip.bad_parity += not valid_parity
    if data and not in_histogram:
        t.omitted[at] += 1
    if in_histogram:
        channel.adc_sum += adc
        histogram = channel.histogram
        if histogram == NULL:
            histogram = add_histogram(t, &t.chips[number - 1], channel)
            if histogram == NULL:
                return
        histogram[adc] += histogram[adc] != <uint32_t>0xffffffff


cdef inline void add_types(Table *t, uint64_t kind, uint64_t rows) noexcept nogil:
    """Add `rows` rows of a possible `kind`, as made by count_rows()."""
    t.types[kind & 255][(kind >> 8) & 1][(kind >> 24) & (TYPES - 1)] += rows


cdef void count_rows(Table *t, const Row2 *rows, size_t n) noexcept nogil:
    """Count rows.

    Thousands of consecutive rows have the same kind: io_group, direction and packet_type. They are counted in a register, and
    tests of the kind are made once. This gives 1.5 times the rows/s, because increments of the same memory wait for each other.
    A row's ADC bin is prefetched, and incremented after BATCH rows, so that cache misses overlap when histograms do not fit a
    core's caches (128 chips: 1.2 times the rows/s at 200,000 rows per call, no difference at 16,000). With many channels their
    counters are prefetched too (6,400 chips: 1.4 times the rows/s; with few channels it would cost a quarter).
    """
    cdef uint32_t *bins[BATCH]
    cdef size_t i, start, end
    cdef int waiting, j
    cdef const Row2 *row
    cdef Channel *channel
    cdef uint32_t *histogram
    cdef uint64_t head
    cdef uint64_t kind
    cdef uint64_t last = ~<uint64_t>0  # kind of the previous row, first of none
    cdef uint64_t run = 0              # rows of this kind that are not in `types` yet
    cdef uint32_t key, number, channel_id
    cdef bint data = False, packet = False, possible = False, reset, valid
    cdef bint far = <size_t>t.n_chips * t.n_channels > LARGE
    start = 0
    while start < n:
        end = start + BATCH if n - start > BATCH else n
        waiting = 0
        for i in range(start, end):
            if far and i + AHEAD < n:
                memcpy(&head, &rows[i + AHEAD], 8)
                number = t.chip_of[(head & 255) << 16 | (head & 0xff00) | ((head >> 16) & 255)]
                prefetch(t.channels + (<size_t>number * t.n_channels - t.n_channels + (head >> 56)), 1)
            row = &rows[i]
            # the first eight bytes: io_group, io_channel, chip_id, packet_type, marker, parity, valid_parity, channel_id.
            memcpy(&head, row, 8)
            kind = (head & <uint64_t>0xff0000ff) | <uint64_t>row.direction << 8
            if kind != last:
                if possible:
                    add_types(t, last, run)
                last = kind
                run = 0
                possible = row.packet_type < TYPES and row.direction <= 1
                packet = possible and row.packet_type <= 3 and row.direction == 1
                data = packet and row.packet_type == t.data_type
            run += 1
            if not packet:
                t.unplaced += not possible
                continue
            key = <uint32_t>((head & 255) << 16 | (head & 0xff00) | ((head >> 16) & 255))
            channel_id = <uint32_t>(head >> 56)
            valid = row.valid_parity != 0
            if Row2 is Row30:
                reset = row.reset_sample_flag != 0
            else:
                reset = False
            number = t.chip_of[key]
            if (
                data and valid and not reset and number != 0 and channel_id < t.n_channels and row.dataword < t.bins
                and not (row.local_fifo | row.shared_fifo)
            ):
                channel = &t.channels[<size_t>(number - 1) * t.n_channels + channel_id]
                histogram = channel.histogram
                if histogram != NULL:
                    channel.packets += 1
                    channel.adc_sum += row.dataword
                    bins[waiting] = histogram + row.dataword
                    prefetch(bins[waiting], 1)
                    waiting += 1
                    continue
            place(
                t, key, channel_id, row.dataword, data, data and valid and not reset, valid, row.local_fifo,
                row.shared_fifo
            )
        for j in range(waiting):
            bins[j][0] += bins[j][0] != <uint32_t>0xffffffff
        start = end
    if possible:
        add_types(t, last, run)


cdef inline int number_before_dash(const char *text, int *position) noexcept nogil:
    """Return the number, 0 to 255, before the next dash, and move `position` after it; -1 without such a number."""
    cdef int value = 0
    cdef int start = position[0]
    cdef int i
    for i in range(start, start + 4):
        if text[i] == c'-':
            position[0] = i + 1
            return value if i > start and value < 256 else -1
        if not c'0' <= text[i] <= c'9':
            return -1
        value = 10 * value + text[i] - c'0'
    return -1


cdef void count_rows_1(Table *t, const Row10 *rows, size_t n) noexcept nogil:
    cdef size_t i
    cdef const Row10 *row
    cdef int position, io_group, io_channel
    cdef bint data, valid
    for i in range(n):
        row = &rows[i]
        position = 0
        io_group = number_before_dash(row.chip_key, &position)
        io_channel = number_before_dash(row.chip_key, &position) if io_group >= 0 else -1
        if row.type >= TYPES or row.direction > 1 or (row.type < 4 and io_channel < 0):
            t.unplaced += 1
            continue
        # INFO messages have no chip_key; they belong to io_group 0, as in the other layouts.
        t.types[io_group if io_channel >= 0 else 0][row.direction][row.type] += 1
        if row.type > 3 or row.direction == 0:
            continue
        data = row.type == t.data_type
        valid = row.valid_parity != 0
        place(
            t, <uint32_t>io_group << 16 | <uint32_t>io_channel << 8 | row.chipid, row.channel, row.adc_counts,
            data, data and valid, valid, (row.fifo_half != 0) | (row.fifo_full != 0) << 1, 0
        )


cdef void sum_chips(const Table *t, ChipRow *out) noexcept nogil:
    cdef uint32_t i, j
    cdef const Chip *chip
    for i in range(t.n_chips):
        chip = &t.chips[i]
        out[i].io_group = chip.key >> 16
        out[i].io_channel = (chip.key >> 8) & 255
        out[i].chip_id = chip.key & 255
        out[i].packets = 0
        for j in range(t.n_channels):
            out[i].packets += t.channels[<size_t>i * t.n_channels + j].packets
        out[i].data = out[i].packets - chip.others
        out[i].bad_parity = chip.bad_parity
        out[i].local_half = chip.local_half
        out[i].local_full = chip.local_full
        out[i].shared_half = chip.shared_half
        out[i].shared_full = chip.shared_full


cdef void sum_flags(const Table *t, uint64_t *out) noexcept nogil:
    """Add the flags of the chips of each io_group to `out`, of shape (256, 5)."""
    cdef uint32_t i
    cdef const Chip *chip
    cdef uint64_t *group
    for i in range(t.n_chips):
        chip = &t.chips[i]
        group = out + 5 * (chip.key >> 16)
        group[0] += chip.bad_parity
        group[1] += chip.local_half
        group[2] += chip.local_full
        group[3] += chip.shared_half
        group[4] += chip.shared_full


cdef void copy_counts(const Table *t, Quantity what, Number *out) noexcept nogil:
    """Write a count of each channel to `out`, of shape (n_chips, n_channels)."""
    cdef size_t i
    cdef size_t n = <size_t>t.n_chips * t.n_channels
    if what == PACKETS:
        for i in range(n):
            out[i] = <Number>t.channels[i].packets
    elif what == DATA:
        for i in range(n):
            out[i] = <Number>(t.channels[i].packets - t.others[i])
    else:
        for i in range(n):
            out[i] = <Number>t.others[i]


cdef void encode_means(const Table *t, uint8_t *out) noexcept nogil:
    """Write the mean ADC value of each channel to `out`, in steps of a 256th of all ADC values; 0: no entries."""
    cdef size_t i
    cdef uint64_t entries
    cdef double step = t.bins // 256
    for i in range(<size_t>t.n_chips * t.n_channels):
        entries = t.channels[i].packets - t.others[i] - t.omitted[i]
        # The mean is below the number of ADC values, so that only its rounding can reach 256.
        out[i] = <uint8_t>min(max(t.channels[i].adc_sum / (step * entries) + 0.5, 1.0), 255.0) if entries else 0


cdef inline uint8_t rate_code(float rate, float slope, float start) noexcept nogil:
    """Return the code of a rate above 0 on a logarithmic scale: 1 to 255."""
    return <uint8_t>min(max(log2f(rate) * slope + start, 1.0), 255.0)


cdef void encode_rates(
    const Table *t, const uint32_t *before, uint32_t chips_before, const double *per_packet, float slope, float start,
    uint8_t *codes, int64_t *counts
) noexcept nogil:
    """Write the codes of the channels' rates, and add the channels that have ever had data packets to `counts`, by code."""
    cdef uint8_t few[FEW]             # codes of the io_group
    cdef uint32_t numbers[4][256]     # in turn, because increments of the same memory wait for each other
    cdef uint32_t i, n
    cdef int group, last = -1
    cdef size_t j, end
    cdef uint64_t data
    cdef uint8_t code
    cdef float factor = 0
    few[0] = 0
    memset(numbers, 0, sizeof(numbers))
    for i in range(t.n_chips):
        group = t.chips[i].key >> 16
        if group != last:
            last = group
            factor = <float>per_packet[group]
            for n in range(1, FEW):
                few[n] = rate_code(n * factor, slope, start) if factor > 0 else 0
        j = <size_t>i * t.n_channels
        end = j + t.n_channels
        while j < end:
            data = t.channels[j].packets
            if t.chips[i].others:
                data -= t.others[j]
            n = <uint32_t>data - (before[j] if i < chips_before else 0)
            if n < FEW:
                code = few[n]
            else:
                code = rate_code(n * factor, slope, start) if factor > 0 else 0
            codes[j] = code
            numbers[j & 3][code] += data != 0
            j += 1
    for i in range(4):
        for n in range(256):
            counts[n] += numbers[i][n]


cdef uint64_t sum_histograms(
    const Table *t, int io_group, int io_channel, int chip_id, int channel_id, uint64_t *out
) noexcept nogil:
    """Add the histograms of the selected channels (-1: all) to `out`.

    Returns the number of channels selected by `channel_id` that are missing, because they share a page with others.
    """
    cdef uint64_t merged = 0
    cdef uint32_t i, j, k
    cdef const Chip *chip
    cdef const Channel *channel
    for i in range(t.n_chips):
        chip = &t.chips[i]
        if io_group >= 0 and <uint32_t>io_group != chip.key >> 16:
            continue
        if io_channel >= 0 and <uint32_t>io_channel != (chip.key >> 8) & 255:
            continue
        if chip_id >= 0 and <uint32_t>chip_id != chip.key & 255:
            continue
        for j in range(t.n_channels):
            channel = &t.channels[<size_t>i * t.n_channels + j]
            if channel.histogram == NULL or (channel_id >= 0 and <uint32_t>channel_id != j):
                continue
            if channel.histogram == chip.shared:
                merged += 1
                continue
            for k in range(t.bins):
                out[k] += channel.histogram[k]
        if chip.shared != NULL and channel_id < 0:
            for k in range(t.bins):
                out[k] += chip.shared[k]
    return merged if channel_id >= 0 else 0


cdef void clear(Table *t) noexcept nogil:
    cdef uint32_t i
    for i in range(t.n_chips):
        t.chip_of[t.chips[i].key] = 0
    for i in range(t.n_slabs):
        free(t.slabs[i])
    free(t.slabs)
    free(t.chips)
    free(t.channels)
    free(t.others)
    free(t.omitted)
    t.slabs = NULL
    t.chips = NULL
    t.channels = NULL
    t.others = t.omitted = NULL
    t.n_slabs = t.slab_room = t.page = 0
    t.n_chips = t.room = t.n_channels = t.bins = 0
    t.pages = t.unplaced = 0
    memset(t.types, 0, sizeof(t.types))


@cython.final
cdef class PacketCounters:
    cdef Table *table
    cdef uint64_t histogram_bytes
    cdef readonly unsigned long long rows
    cdef bint busy

    def __cinit__(self, histogram_bytes=512 << 20):
        if not 0 <= histogram_bytes <= 1 << 48:
            raise ValueError(f"histogram_bytes: expected 0 to 2^48, found {histogram_bytes}")
        self.histogram_bytes = histogram_bytes
        self.table = <Table *>calloc(1, sizeof(Table))
        if self.table == NULL:
            raise MemoryError("PacketCounters: no memory for the counters")
        self.table.chip_of = <uint32_t *>calloc(KEYS, sizeof(uint32_t))
        if self.table.chip_of == NULL:
            raise MemoryError("PacketCounters: no memory for the table of chips")

    def __dealloc__(self):
        if self.table != NULL:
            if self.table.chip_of != NULL:
                clear(self.table)
            free(self.table.chip_of)
            free(self.table)

    @property
    def bins(self):
        return self.table.bins

    @property
    def unplaced(self):
        return self.table.unplaced

    def count(self, rows):
        cdef const Row24[::1] rows24
        cdef const Row24Clock64[::1] rows24_clock64
        cdef const Row30[::1] rows30
        cdef const Row10[::1] rows10
        cdef size_t itemsize = memoryview(rows).itemsize
        cdef Table *t = self.table
        cdef size_t n
        if itemsize == sizeof(Row24):
            rows24 = rows
            n = rows24.shape[0]
            self._begin(64, 256, 0)
            if n:
                with nogil:
                    count_rows(t, &rows24[0], n)
        elif itemsize == sizeof(Row24Clock64):
            rows24_clock64 = rows
            n = rows24_clock64.shape[0]
            self._begin(64, 256, 0)
            if n:
                with nogil:
                    count_rows(t, &rows24_clock64[0], n)
        elif itemsize == sizeof(Row30):
            rows30 = rows
            n = rows30.shape[0]
            self._begin(64, 1024, 1)
            if n:
                with nogil:
                    count_rows(t, &rows30[0], n)
        elif itemsize == sizeof(Row10):
            rows10 = rows
            n = rows10.shape[0]
            self._begin(128, 1024, 0)
            if n:
                with nogil:
                    count_rows_1(t, &rows10[0], n)
        else:
            raise ValueError(f"rows of {itemsize} bytes: no layout has them (2.4 has 36 or 40, 3.0 has 43, 1.0 has 56)")
        self.busy = False
        self.rows += n

    cdef int _begin(self, uint32_t channels, uint32_t bins, uint8_t data_type) except -1:
        """Reject another chip generation or thread. The table belongs to this caller until it resets `busy`."""
        self._idle()
        if self.table.bins == 0:
            self.table.n_channels = channels
            self.table.bins = bins
            self.table.data_type = data_type
            self.table.page_limit = self.histogram_bytes // (bins * sizeof(uint32_t))
        elif self.table.n_channels != channels or self.table.bins != bins:
            raise ValueError(
                f"rows of chips with {channels} channels and {bins} ADC values, counted so far: "
                f"{self.table.n_channels} and {self.table.bins}; call reset() in between"
            )
        self.busy = True
        return 0

    cdef int _idle(self) except -1:
        if self.busy:
            raise RuntimeError("PacketCounters: another thread is counting")
        return 0

    def reset(self):
        self._idle()
        clear(self.table)
        self.rows = 0

    @property
    def sync_rows(self):
        cdef uint64_t rows = 0
        cdef int i, j
        for i in range(256):
            for j in range(2):
                rows += self.table.types[i][j][SYNC]
        return rows

    def types(self):
        self._idle()
        cdef uint64_t[:, :, ::1] view = <uint64_t[:256, :2, :TYPES]>&self.table.types[0][0][0]
        return np.array(view)

    def chips(self):
        self._idle()
        out = np.zeros(self.table.n_chips, CHIPS)
        cdef ChipRow[::1] view = out
        if self.table.n_chips:
            with nogil:
                sum_chips(self.table, &view[0])
        return out

    def keys(self):
        self._idle()
        out = np.zeros((self.table.n_chips, 3), np.uint8)
        cdef uint8_t[:, ::1] view = out
        cdef uint32_t i
        for i in range(self.table.n_chips):
            view[i, 0] = self.table.chips[i].key >> 16
            view[i, 1] = (self.table.chips[i].key >> 8) & 255
            view[i, 2] = self.table.chips[i].key & 255
        return out

    def flags(self):
        self._idle()
        out = np.zeros((256, 5), np.uint64)
        cdef uint64_t[:, ::1] view = out
        sum_flags(self.table, &view[0, 0])
        return out

    def channels(self):
        return self._counts(PACKETS, np.uint64)

    def others(self):
        return self._counts(OTHERS, np.uint64)

    def data(self):
        return self._counts(DATA, np.uint32)

    cdef object _counts(self, Quantity what, dtype):
        cdef uint64_t[::1] wide
        cdef uint32_t[::1] narrow
        self._idle()
        out = np.empty((self.table.n_chips, self.table.n_channels), dtype)
        if not out.size:
            return out
        if dtype is np.uint64:
            wide = out.reshape(-1)
            with nogil:
                copy_counts(self.table, what, &wide[0])
        else:
            narrow = out.reshape(-1)
            with nogil:
                copy_counts(self.table, what, &narrow[0])
        return out

    def rates(self, before, per_packet, double slope, double start):
        self._idle()
        cdef Table *t = self.table
        cdef const double[::1] factors = per_packet
        cdef const uint32_t[:, ::1] earlier = before
        if factors.shape[0] != 256:
            raise ValueError(f"per_packet: expected 256 io_groups, found {factors.shape[0]}")
        if earlier.shape[0] > t.n_chips or (earlier.shape[0] and earlier.shape[1] != t.n_channels):
            raise ValueError(
                f"before: expected at most {t.n_chips} chips with {t.n_channels} channels, found {earlier.shape[0]} "
                f"with {earlier.shape[1]}"
            )
        codes, counts = np.empty((t.n_chips, t.n_channels), np.uint8), np.zeros(256, np.int64)
        cdef uint8_t[::1] view = codes.reshape(-1)
        cdef int64_t[::1] histogram = counts
        if view.shape[0]:
            with nogil:
                encode_rates(
                    t, &earlier[0, 0] if earlier.shape[0] else NULL, <uint32_t>earlier.shape[0], &factors[0],
                    <float>slope, <float>start, &view[0], &histogram[0]
                )
        return codes, counts

    def mean_adc(self):
        self._idle()
        out = np.empty((self.table.n_chips, self.table.n_channels), np.uint8)
        cdef uint8_t[::1] view = out.reshape(-1)
        if view.shape[0]:
            with nogil:
                encode_means(self.table, &view[0])
        return out

    def histogram(self, int io_group=-1, int io_channel=-1, int chip_id=-1, int channel_id=-1):
        self._idle()
        out = np.zeros(self.table.bins, np.uint64)
        cdef uint64_t[::1] view = out
        cdef uint64_t merged = 0
        if self.table.bins:
            with nogil:
                merged = sum_histograms(self.table, io_group, io_channel, chip_id, channel_id, &view[0])
        return out, merged
