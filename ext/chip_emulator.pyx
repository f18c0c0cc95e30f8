"""Emulated chips execute configuration words in order of arrival: writes set registers, reads are answered.

The paths of words are found in larpixdaq/emulators/network.py, only when they are needed: an entry UNKNOWN in `hears` or
`leaves` stops the loop, and the caller fills it in. A change of a watched register stops the loop, too, because it may change
paths.
"""

cimport cython
from libc.stdint cimport int16_t, int32_t, uint8_t, uint64_t

from row_codec cimport odd_parity, with_odd_parity

cdef enum:
    WRITE = 2

#: Entries of `hears` and `leaves` in place of a chip or io_channel: none, several, not found yet.
cpdef enum PathEnd:
    NONE = -1
    SEVERAL = -2
    UNKNOWN = -3

#: Reason why serve() returned: no more words or no more room for answers; unknown path of the next word; changed register.
cpdef enum Stop:
    DONE = 0
    PATH_UNKNOWN = 1
    REGISTER_CHANGED = 2

cdef uint64_t _MAGIC = <uint64_t>0x89504E47
cdef uint64_t _DOWNSTREAM = <uint64_t>1 << 62


@cython.final
cdef class RegisterBank:
    """Registers of a board's chips, which execute configuration words. The interface is documented in chip_emulator.pyi."""

    cdef uint8_t[:, ::1] _registers
    cdef const uint8_t[:, ::1] _keep
    cdef const uint8_t[:, ::1] _force
    cdef const uint8_t[::1] _watched
    cdef uint8_t[::1] _changed
    cdef const int32_t[:, ::1] _hears
    cdef const int16_t[::1] _leaves
    cdef int _count
    cdef int _parity
    cdef bint _magic
    cdef bint _checks_parity
    cdef readonly uint64_t unheard
    cdef readonly uint64_t refused
    cdef readonly int chip
    cdef readonly int address
    cdef readonly int old_value

    def __init__(self, registers, keep, force, watched, changed, hears, leaves, *, count, v1=False, magic=False,
                 checks_parity=False):
        self._registers, self._keep, self._force = registers, keep, force
        self._watched, self._changed, self._hears, self._leaves = watched, changed, hears, leaves
        chips = self._registers.shape[0]
        for name, shape, expected in (
            ("registers", registers.shape, (chips, 256)), ("keep", keep.shape, (chips, 256)),
            ("force", force.shape, (chips, 256)), ("watched", watched.shape, (256,)),
            ("changed", changed.shape, (chips,)), ("hears", hears.shape, (256, 256)),
            ("leaves", leaves.shape, (chips,)),
        ):
            if shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, found {shape}")
        if not 1 <= count <= 256:
            raise ValueError(f"count: expected 1 to 256 registers, found {count}")
        self._count, self._magic, self._checks_parity = count, magic, checks_parity
        self._parity = 53 if v1 else 63

    def serve(self, words, channels, start, answers, answer_channels, made):
        cdef const uint64_t[::1] word = words
        cdef const uint8_t[::1] channel = channels
        cdef uint64_t[::1] out = answers
        cdef uint8_t[::1] out_channel = answer_channels
        cdef Py_ssize_t i = start, n = word.shape[0], m = made, room = out.shape[0]
        cdef int32_t chip
        cdef int16_t leaves
        cdef int stop = DONE
        if channel.shape[0] != n or out_channel.shape[0] != room or not 0 <= i <= n or not 0 <= m <= room:
            raise ValueError(
                f"serve: {n} words on {channel.shape[0]} channels from {start}; {made} of {room} answers on "
                f"{out_channel.shape[0]} channels"
            )
        with nogil:
            while i < n:
                if not self._accepts(word[i]):
                    self.refused += 1
                    i += 1
                    continue
                chip = self._hears[channel[i], (word[i] >> 2) & 0xFF]
                if chip == NONE:
                    self.unheard += 1
                    i += 1
                    continue
                if chip < 0 or chip >= self._registers.shape[0]:
                    stop = PATH_UNKNOWN
                    break
                if word[i] & 3 == WRITE:
                    i += 1
                    if self._write(chip, word[i - 1]):
                        stop = REGISTER_CHANGED
                        break
                    continue
                leaves = self._leaves[chip]
                if leaves < NONE:
                    stop = PATH_UNKNOWN
                    break
                if m == room:
                    break
                if leaves != NONE:
                    out[m] = self._read(chip, word[i])
                    out_channel[m] = <uint8_t>leaves
                    m += 1
                i += 1
        return i, m, stop

    def deliver(self, chip, word):
        cdef int c = chip
        cdef uint64_t w = word
        if not 0 <= c < self._registers.shape[0]:
            raise ValueError(f"deliver: chip {chip} of {self._registers.shape[0]}")
        if w & 3 == WRITE:
            self._write(c, w)
            return 0
        return self._read(c, w)

    cdef inline bint _accepts(self, uint64_t word) noexcept nogil:
        if word & 3 < WRITE or (self._parity == 63 and word & _DOWNSTREAM):
            return False
        # Only v3 chips check the parity: v2 chips accept the wrong parity that larpix-control sends for every other chip_id
        # when it sets up a network.
        if self._checks_parity and not odd_parity(word):
            return False
        return not self._magic or (word >> 26) & <uint64_t>0xFFFFFFFF == _MAGIC

    cdef inline bint _write(self, int chip, uint64_t word) noexcept nogil:
        """Set a register. Returns whether it is watched and has changed."""
        cdef int address = (word >> 10) & 0xFF
        cdef uint8_t old, new
        if address >= self._count:
            return False
        old = self._registers[chip, address]
        new = (<uint8_t>(word >> 18) & self._keep[chip, address]) | self._force[chip, address]
        if new == old:
            return False
        self._registers[chip, address] = new
        self._changed[chip] = 1
        self.chip, self.address, self.old_value = chip, address, old
        return self._watched[address]

    cdef inline uint64_t _read(self, int chip, uint64_t word) noexcept nogil:
        cdef int address = (word >> 10) & 0xFF
        cdef uint64_t answer = (word & ((<uint64_t>1 << self._parity) - 1)) & ~(<uint64_t>0xFF << 18)
        if address < self._count:
            answer |= <uint64_t>self._registers[chip, address] << 18
        if self._parity == 63:
            answer |= _DOWNSTREAM
        return with_odd_parity(answer, self._parity)
