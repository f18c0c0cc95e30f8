# Data words of v2 chips from legacy PACMAN messages to rows of layout 2.4, two words at a time: the common case of
# legacy_words() in pacman_decoder.pxd, in which nothing is rare.
from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #include <string.h>
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    typedef uint64_t Pair __attribute__((vector_size(16)));
    #ifdef __clang__
    #define JOIN(a, b, i, j) __builtin_shufflevector(a, b, i, j)
    #else
    #define JOIN(a, b, i, j) __builtin_shuffle(a, b, (Pair){i, j})
    #endif
    #define FIRSTS(a, b) JOIN(a, b, 0, 2)
    #define SECONDS(a, b) JOIN(a, b, 1, 3)

    /* Decode pairs of D words of 16 bytes into rows of 36 bytes (row_structs.Row24), as word_row() in row_codec.pxd does.
       Each 8 bytes of a row are put together in a register, because one store for each of 22 columns takes longer than all
       the rest; only the parity, which takes as many instructions as all columns, is better off beside them. Stops before
       a pair with another word. Returns the number of words; adds the rows with wrong parity to *bad and the bits of all
       words to *bits. */
    static __attribute__((noinline)) Py_ssize_t pair_rows(  /* inlined, it slows down messages of one word */
        const uint8_t* at, Py_ssize_t words, uint8_t* row, uint8_t io_group, Py_ssize_t* bad, uint64_t* bits
    ) {
        const uint64_t one = 1, group = io_group;
        Pair all = {0, 0};
        Py_ssize_t n = 0, right = 0;
        for (; n + 2 <= words && at[0] == 'D' && at[16] == 'D'; n += 2, at += 32, row += 72) {
            Pair a, b;
            uint64_t first, second;
            memcpy(&first, at + 8, 8);
            memcpy(&second, at + 24, 8);
            const int first_odd = __builtin_parityll(first), second_odd = __builtin_parityll(second);
            right += first_odd + second_odd;
            memcpy(&a, at, 16);
            memcpy(&b, at + 16, 16);
            const Pair head = FIRSTS(a, b), word = SECONDS(a, b);
            all |= word;
            const Pair keys =                                  /* bytes 0 to 7 of the row, without valid_parity */
                group                                          /* io_group */
                | (head & 0xff00)                              /* io_channel */
                | (word << 14 & 0xff0000)                      /* chip_id: bits 2 to 9 */
                | (word << 24 & 0x3000000)                     /* packet_type: bits 0 and 1 */
                | (word >> 30 & one << 32)                     /* downstream_marker: bit 62 */
                | (word >> 23 & one << 40)                     /* parity: bit 63 */
                | (word << 46 & one * 0x3f << 56);             /* channel_id: bits 10 to 15 */
            const Pair timestamp = word >> 16 & 0x7fffffff;    /* bytes 8 to 15: bits 16 to 46 */
            const Pair data =                                  /* bytes 16 to 23 */
                (word >> 48 & 0x3ff)                           /* dataword: bits 48 to 55, trigger_type: 56 and 57 */
                | (word >> 42 & 0x30000)                       /* local_fifo: bits 58 and 59 */
                | (word >> 36 & 0x3000000)                     /* shared_fifo: bits 60 and 61 */
                | (word << 22 & one * 0xffff << 32)            /* register_address, register_data: bits 10 to 25 */
                | one << 48;                                   /* direction; local_fifo_events: 0 */
            const Pair rest = word << 9 & one << 56;           /* bytes 24 to 31: first_packet: bit 47 */
            a = FIRSTS(keys, timestamp);
            b = FIRSTS(data, rest);
            memcpy(row, &a, 16);
            memcpy(row + 16, &b, 16);
            memcpy(row + 32, at + 2, 4);                       /* receipt_timestamp */
            row[6] = (uint8_t)first_odd;                       /* valid_parity */
            a = SECONDS(keys, timestamp);
            b = SECONDS(data, rest);
            memcpy(row + 36, &a, 16);
            memcpy(row + 52, &b, 16);
            memcpy(row + 68, at + 18, 4);
            row[42] = (uint8_t)second_odd;
        }
        *bits |= all[0] | all[1];
        *bad += n - right;
        return n;
    }
    #else
    static Py_ssize_t pair_rows(
        const uint8_t* at, Py_ssize_t words, uint8_t* row, uint8_t io_group, Py_ssize_t* bad, uint64_t* bits
    ) {
        return 0;
    }
    #endif
    """
    Py_ssize_t pair_rows(
        const uint8_t* at, Py_ssize_t words, uint8_t* row, uint8_t io_group, Py_ssize_t* bad, uint64_t* bits
    ) noexcept nogil
