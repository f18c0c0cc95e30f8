# Python arrays to pointers: the one place where the dtype of rows is checked against the structs.
from libc.stdint cimport uint8_t

from wire cimport Row10, Row24, Row24Clock64, Row30, V1, V2, V2_DIAGNOSTICS, V3

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
    """Where the rows are. They stay there for as long as the caller holds `rows`."""
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
