/* Copies 36 bytes for each word of 16 bytes: the minimum work of a decoder, as reference for the kernels. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

void copy_words(const uint8_t *words, uint8_t *rows, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint8_t word[16];
        memcpy(word, words + 16 * i, 16);
        memcpy(rows + 36 * i, word, 16);
        memcpy(rows + 36 * i + 16, word, 16);
        memcpy(rows + 36 * i + 32, word, 4);
    }
}
