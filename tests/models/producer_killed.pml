/* A producer is killed between any two stores to its ring, and a successor restores it: ring_buffer.pyx, BlockBuilder and
 * crash_recovery.py. The successor may be killed too.
 *
 * What is stored in several steps (a descriptor, a run's entry, a checkpoint) is `whole` only from the release store on
 * that publishes it. Fields that the successor derives are not in the model.
 *
 * Properties, when a successor has ended the open run: each block and its run's entry is whole; rows in blocks are those
 * that were published; the counters of the end record agree with them: rows = stored + dropped, INFO rows = stored, and
 * dropped rows are in exactly one header as a gap.
 *
 * Each macro in MUTATIONS of test_models.py takes away one precaution, and must be found.
 */
#define DESCRIPTORS 4
#define RUNS 3
#define MAX_RUNS 4
#define STEPS 5             /* fewer messages without checkpoint than descriptors */

#define BLOCK 1
#define INFO 2
#define END 3

typedef Descriptor { bool whole; byte number, kind, words, dropped, infos }
typedef Run { bool whole; byte number, first }
typedef Checkpoint { bool whole; byte head, open, gap, words, dropped, infos }

/* The file. */
byte head, tail, n_runs, n_checkpoints;
Descriptor block[DESCRIPTORS];
Run entry[RUNS];
Checkpoint saved[2];
byte open, gap, words, dropped, infos;   /* not read by a successor */

/* What must be found, of the newest run. */
byte rows_published, rows_in_blocks, infos_in_blocks, gaps_in_headers, published;
byte life;                     /* 0: the producer runs; 1, 2: its successors, whose _pid is greater by 1 */

#ifdef CHECKPOINT_IN_PLACE
#define NEXT 0
#define STEP 2
#else
#define NEXT ((n_checkpoints + 1) % 2)
#define STEP 1
#endif
inline checkpoint() {
    saved[NEXT].whole = false;
    d_step {
        saved[NEXT].head = head; saved[NEXT].open = open; saved[NEXT].gap = gap;
        saved[NEXT].words = words; saved[NEXT].dropped = dropped; saved[NEXT].infos = infos;
        saved[NEXT].whole = true;
        n_checkpoints = n_checkpoints + STEP; rows_published = published
    }
}

inline write(i, what, n) {
    block[i].number = entry[(n_runs - 1) % RUNS].number; block[i].kind = what;
    block[i].words = words; block[i].dropped = dropped; block[i].infos = infos;
    block[i].whole = true;
    gaps_in_headers = gaps_in_headers + taken;
    rows_in_blocks = rows_in_blocks + (what == BLOCK -> n : 0);
    infos_in_blocks = infos_in_blocks + (what == INFO -> 1 : 0)
}
inline push(what, n) {         /* its header takes the gap */
    taken = gap; gap = 0;
    block[head % DESCRIPTORS].whole = false;
#ifdef HEAD_FIRST
    head++;
    d_step { write((head - 1) % DESCRIPTORS, what, n) };
#else
    d_step { write(head % DESCRIPTORS, what, n); head++ };
#endif
    open = 0
}

inline close() { if :: open > 0 -> push(BLOCK, open) :: else fi }

#define ROOM(n) (head + n - tail <= DESCRIPTORS)

#define OPEN (n_runs > 0 && (head == entry[(n_runs - 1) % RUNS].first || block[(head - 1) % DESCRIPTORS].kind != END))
#ifdef ENTRY_IN_USE
#define FREE_ENTRY true
#else
#define FREE_ENTRY (n_runs < RUNS - 1 || entry[(n_runs + 2) % RUNS].first <= tail)
#endif

proctype producer() provided (life == _pid - 1) {
    byte steps, taken;
    do
    :: steps == STEPS -> break
    :: steps < STEPS -> steps++;
        if
        :: !OPEN && n_runs < MAX_RUNS && FREE_ENTRY && ROOM(1) -> /* begin() */
            words = 0; dropped = 0; infos = 0; gap = 0;
#ifndef BEGIN_WITHOUT_CHECKPOINT
            checkpoint();
#endif
            entry[n_runs % RUNS].whole = false;
            d_step {
                entry[n_runs % RUNS].number = n_runs + 1; entry[n_runs % RUNS].first = head;
                entry[n_runs % RUNS].whole = true;
                n_runs++; published = 0;
                rows_published = 0; rows_in_blocks = 0; infos_in_blocks = 0; gaps_in_headers = 0
            }
        :: OPEN && ROOM(2) ->              /* rows() and publish() */
            words++;
            open++; published++;
            checkpoint();
            if :: open == 2 -> close() :: else fi
        :: OPEN ->                         /* drop() */
            words++;
            dropped++; gap++;
            checkpoint()
        :: OPEN && ROOM(2) -> close()
        :: OPEN && ROOM(3) -> close(); infos++; push(INFO, 1)
        :: OPEN && ROOM(2) -> close(); push(END, 0)
        :: tail < head -> tail++           /* all storages have it */
        :: else
        fi
    od;
    false                                  /* it does not end, so that _pid is not used again */
}

byte index, k, n;

/* Ring._restore() */
inline restore() {
    d_step {
        index = tail;
        do
        :: index == head -> break
        :: index < head ->
            assert(block[index % DESCRIPTORS].whole);
            n = 0; k = (n_runs > RUNS - 1 -> n_runs - (RUNS - 1) : 0);
            do
            :: k == n_runs -> break
            :: k < n_runs ->
                assert(entry[k % RUNS].whole);
                n = n + (entry[k % RUNS].number == block[index % DESCRIPTORS].number -> 1 : 0); k++
            od;
            assert(n == 1);
            index++
        od;
        if
        :: n_checkpoints > 0 ->
            assert(saved[n_checkpoints % 2].whole && saved[n_checkpoints % 2].head <= head);
            words = saved[n_checkpoints % 2].words; dropped = saved[n_checkpoints % 2].dropped;
            infos = saved[n_checkpoints % 2].infos;
            index = saved[n_checkpoints % 2].head;
            index = (head > index + DESCRIPTORS -> head - DESCRIPTORS : index);
#ifdef INFOS_IN_USE_ONLY
            index = (tail > index -> tail : index);
#endif
            do
            :: index >= head -> break
            :: index < head -> infos = infos + (block[index % DESCRIPTORS].kind == INFO -> 1 : 0); index++
            od;
            if
            :: saved[n_checkpoints % 2].head < head -> open = 0; gap = 0
            :: else -> open = saved[n_checkpoints % 2].open; gap = saved[n_checkpoints % 2].gap
            fi
        :: else -> open = 0; gap = 0; words = 0; dropped = 0; infos = 0
        fi;
#ifdef GAPS_TWICE
        gap = (n_checkpoints > 0 -> saved[n_checkpoints % 2].gap : 0);
#endif
    }
}

proctype successor() provided (life == _pid - 1) {        /* Predecessors._close_run() */
    byte taken;
    restore();
    if
    :: OPEN -> close(); push(END, 0)
    :: else
    fi;
    index = (head - 1) % DESCRIPTORS;
    if
    :: n_runs > 0 && tail < head ->        /* the newest run has its end record in the ring */
        assert(block[index].kind == END);
        assert(block[index].words == rows_in_blocks + block[index].dropped);
        assert(block[index].infos == infos_in_blocks);
        assert(block[index].dropped == gaps_in_headers);
        assert(rows_in_blocks == rows_published)
    :: else
    fi;
    false
}

init {
    run producer();
    life = 1; run successor();
    life = 2; run successor()
}
