/* A Reader reads a block in the ring while its producer overwrites it: ring_buffer.pyx, rows(), append(), _push(),
 * _claim() and Reader.
 *
 * Memory is that of C11, as on ARM: plain stores become visible in any order, also before an earlier store_release(). A
 * load may return any store to its place, except one that the reader knows to be overwritten. The reader knows the stores
 * before `seen` (one number, because all stores are of one process, in its order). A release store brings knowledge of all
 * stores before it, a plain store that of those before the last fence, once the reader has passed a fence too. The
 * producer does not depend on the reader: so it makes all its stores first, and loads choose among them. Loads of head and
 * claimed return the oldest possible store, which passes more looks than a newer one, and makes less known.
 *
 * Properties: if the first look succeeds, the descriptor is that of the block; if read() succeeds, all rows are too.
 *
 * Assumed: the number of a block comes to the reader in a message, which was sent after its head was stored.
 * Each macro in MUTATIONS of test_models.py takes away one precaution, and must be found.
 */
#define ARENA 3        /* places for rows */
#define DESCRIPTORS 3
#define BLOCKS 5
#define STORES 60
#define NOTHING 255

#define HEAD 0
#define CLAIMED 1
#define START(i) (2 + (i) % DESCRIPTORS)
#define ROWS(i) (2 + DESCRIPTORS + (i) % DESCRIPTORS)
#define ROW(position) (2 + 2 * DESCRIPTORS + (position) % ARENA)
#define PLACES (2 + 2 * DESCRIPTORS + ARENA)

/* All stores: value, the next store to the same place, and up to which number a reader of it knows the stores. The first
 * PLACES of them are the first content, 0. */
byte value[STORES], after[STORES], brings[STORES], stores = PLACES - 1;
byte last[PLACES];     /* the number of the last store to each place */
byte fenced;           /* the number of the last store before the producer's last fence */
byte claimed_now;      /* the producer's own copy */

/* What a block truly is. */
byte true_start[BLOCKS], true_rows[BLOCKS], published[BLOCKS];

inline store(where, what) {
    stores++; assert(stores < STORES);
    after[last[where]] = stores; last[where] = stores; value[stores] = what; brings[stores] = fenced
}
inline store_release(where, what) { store(where, what); brings[stores] = stores }
inline fence() { fenced = stores }

inline claim(position) {
    if
    :: position > claimed_now -> claimed_now = position; store_release(CLAIMED, position);
#ifndef NO_CLAIM_FENCE
        fence()
#endif
    :: else
    fi
}

/* The reader. */
byte seen, pending, newest[PLACES];

inline oldest(where) {         /* w: the number of the oldest store that a load may return */
    w = newest[where];
    do :: after[w] != 0 && after[w] <= seen -> w = after[w] :: else -> break od
}
inline load(where, result) {   /* relaxed: this store, or a later one */
    oldest(where);
    do :: break :: after[w] != 0 -> w = after[w] od;
    newest[where] = w; result = value[w];
    if :: brings[w] > pending -> pending = brings[w] :: else fi
}
inline load_acquire(where, result) {
    oldest(where);
    newest[where] = w; result = value[w];
    if :: brings[w] > seen -> seen = brings[w] :: else fi
}
inline reader_fence() { if :: pending > seen -> seen = pending :: else fi }

inline look(first) {           /* _intact() */
    load_acquire(HEAD, head);
    load_acquire(CLAIMED, claimed);
#ifdef SLOT_BOUND
    intact = index < head && head <= index + DESCRIPTORS && claimed <= first + ARENA
#else
    intact = index < head && head < index + DESCRIPTORS && claimed <= first + ARENA
#endif
}

byte k, position, capacity, rows, i;
byte w, index, start, first, n, head, claimed, row;
bool intact;

active proctype ring() {
    atomic {
        do :: i == PLACES -> break :: i < PLACES -> last[i] = i; newest[i] = i; i++ od;
        do                                                     /* the producer, which frees all blocks at once */
        :: k == BLOCKS -> break
        :: k < BLOCKS ->
            if
            :: capacity = 2; rows = 1                          /* a block, closed before it is full */
            :: capacity = 2; rows = 2
            :: capacity = 1; rows = 1                          /* append() */
            fi;
            if :: ARENA - position % ARENA < capacity -> position = position + ARENA - position % ARENA :: else fi;
#ifndef CLAIM_LATE
            claim(position + capacity);
#endif
            i = 0;
            do :: i == rows -> break :: i < rows -> store(ROW(position + i), k + 1); i++ od;
#ifdef CLAIM_LATE
            claim(position + capacity);
#endif
            true_start[k] = position; true_rows[k] = rows;
#ifndef NO_PUSH_FENCE
            fence();
#endif
            store(START(k), position);
            store(ROWS(k), rows);
            store_release(HEAD, k + 1);
            published[k] = stores;
            position = position + rows; k++
        od;
        if                                                     /* a successor may give back all memory without blocks */
        :: true
        :: rows = true_rows[BLOCKS - 1]; start = true_start[BLOCKS - 1];
#ifndef GIVE_BACK_WITHOUT_CLAIM
            claim(start + ARENA);
#endif
            i = rows;
            do :: i == ARENA -> break :: i < ARENA -> store(ROW(start + i), NOTHING); i++ od
        fi;

        select(index : 0 .. BLOCKS - 1);                       /* Reader.read(index) */
        seen = published[index];
        load(START(index), start);
        load(START(index), first); load(ROWS(index), n);       /* view() */
#ifndef NO_VIEW_FENCE
        reader_fence();
#endif
        look(first);
        if
        :: intact ->
            assert(first == true_start[index] && n == true_rows[index]);
            if                                                 /* one row; loads of others make only more known */
            :: i = 0
            :: n == 2 -> i = 1
            fi;
            load(ROW(first + i), row);
#ifndef NO_COPY_FENCE
            reader_fence();
#endif
#ifndef NO_SECOND_LOOK
            look(start);
#endif
            assert(!intact || row == index + 1)
        :: else
        fi
    }
}
