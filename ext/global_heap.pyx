"""Read the variable-length bytes of an HDF5 file from its global heaps. The interface is documented in global_heap.pyi.

A collection is "GCOL", version 1, 3 bytes, its length u64 (with these 16 bytes), and objects: number u16, references u16,
4 bytes, length u64, then the object, filled up to 8 bytes. Number 0 is free space, after the last object.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport pread

cimport cython

cdef enum:
    HEAD = 16                        # bytes before the first object of a collection, and before the bytes of an object
    NUMBERS = 1 << 16
    # Bytes that are read at once: in the order of the file, and elsewhere.
    AHEAD = 1 << 20
    ELSEWHERE = 16 << 10
    # Bytes before the wanted ones that are read too, because HDF5 fills the rest of some sixteen earlier collections.
    BEHIND = 128 << 10
    # Maximum length of a collection. HDF5 makes collections of 4 kB, or a little longer than their only object.
    MOST = 64 << 20
    # Bytes of collections that may be searched for an object on average. With more, a few collections of a damaged file
    # would be searched again and again.
    SEARCHED = 64 << 10

cdef packed struct Reference:
    uint32_t length
    uint64_t address
    uint32_t number


@cython.final
cdef class HeapReader:
    cdef int file
    cdef uint64_t base
    cdef uint8_t* window             # bytes of the file from `start` on
    cdef size_t room
    cdef uint64_t start
    cdef size_t filled
    cdef uint64_t address            # of the collection whose objects are in `places`; 0: none
    cdef uint32_t* places            # number of an object -> its place in the collection; 0: there is none
    cdef size_t numbers              # the highest number in `places`, plus 1

    def __cinit__(self, int file, uint64_t base=0):
        self.file, self.base = file, base
        self.places = <uint32_t*>calloc(NUMBERS, sizeof(uint32_t))
        if self.places == NULL:
            raise MemoryError("HeapReader: no memory")

    def __dealloc__(self):
        free(self.window)
        free(self.places)

    cdef const uint8_t* _load(self, uint64_t place, size_t size) noexcept nogil:
        """Return the address of `size` bytes of the file; NULL when it has fewer, or there is no memory."""
        cdef size_t wanted = ELSEWHERE
        cdef Py_ssize_t n
        cdef uint64_t first = place
        cdef uint8_t* grown
        if place >> 62:
            return NULL
        if self.start <= place and place + size <= self.start + self.filled:
            return self.window + (place - self.start)
        if self.start <= place <= self.start + self.filled + AHEAD:
            wanted = AHEAD
            first -= min(place, <uint64_t>BEHIND)
        wanted = max(wanted, size) + (place - first)
        if wanted > self.room:
            grown = <uint8_t*>realloc(self.window, wanted)
            if grown == NULL:
                return NULL
            self.window, self.room = grown, wanted
        self.start, self.filled = first, 0
        while self.filled < wanted:
            n = pread(self.file, self.window + self.filled, wanted - self.filled, <int64_t>(first + self.filled))
            if n <= 0:
                break
            self.filled += n
        return self.window + (place - first) if self.filled >= place - first + size else NULL

    cdef const uint8_t* _collection(self, uint64_t address, uint64_t* searched) noexcept nogil:
        """Return the collection at an address of the file, with its objects in `places`; NULL when it is damaged."""
        cdef const uint8_t* at
        cdef uint64_t length, size, place = HEAD, taken
        cdef uint16_t number
        if address == self.address and self.address:
            return self.window + (self.base + address - self.start)
        self.address = 0
        memset(self.places, 0, self.numbers * sizeof(uint32_t))
        self.numbers = 0
        if address >> 62:
            return NULL
        at = self._load(self.base + address, HEAD)
        if at == NULL or memcmp(at, b"GCOL\x01", 5):
            return NULL
        memcpy(&length, at + 8, 8)
        if not HEAD <= length <= MOST:
            return NULL
        at = self._load(self.base + address, <size_t>length)
        if at == NULL:
            return NULL
        searched[0] += length
        while length - place >= HEAD:
            memcpy(&number, at + place, 2)
            if not number:
                break
            memcpy(&size, at + place + 8, 8)
            if size > MOST:
                return NULL
            taken = HEAD + (size + 7) // 8 * 8
            if taken > length - place:
                return NULL
            self.places[number] = <uint32_t>place
            self.numbers = max(self.numbers, <size_t>number + 1)
            place += taken
        self.address = address
        return at

    cdef Py_ssize_t _copy(self, const Reference* given, Py_ssize_t n, uint8_t* out, size_t room) noexcept nogil:
        cdef Py_ssize_t i
        cdef uint64_t size, searched = 0
        cdef const uint8_t* at
        for i in range(n):
            if not given[i].length:
                continue
            at = self._collection(given[i].address, &searched)
            if at == NULL or given[i].number >= NUMBERS or not self.places[given[i].number]:
                return i
            if searched > MOST + <uint64_t>SEARCHED * n:
                return i
            at += self.places[given[i].number]
            memcpy(&size, at + 8, 8)
            if size != given[i].length or size > room:
                return i
            memcpy(out, at + HEAD, size)
            out += size
            room -= size
        return n

    def read(self, const Reference[::1] references not None, uint8_t[::1] out not None) -> int:
        cdef Py_ssize_t n = references.shape[0], copied = 0
        cdef uint8_t nothing
        if n:
            with nogil:
                copied = self._copy(&references[0], n, &out[0] if out.shape[0] else &nothing, <size_t>out.shape[0])
        return copied
