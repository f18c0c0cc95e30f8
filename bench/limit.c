/* The least that a decoder of board words does: 16 bytes in, 36 bytes out. What decodes is measured beside it. */

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
