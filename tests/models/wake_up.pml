/* A consumer's thread hands frames to the process's loop: Consumer in stream/subscriber.py, and Waker.
 *
 * The thread appends frames to the queue and wakes the loop. The loop polls, takes frames until next() returns None, and
 * polls again. At one moment the loop finds a frame that it cannot use (its file has failed) and calls resubscribe(): all
 * blocks come again, from its position on.
 *
 * Properties: no frame follows a gap (assert); the loop does not sleep while frames wait, and in the end has all of them
 * (a state in which nothing can happen is an error unless the loop has ended).
 *
 * Each macro in MUTATIONS of test_models.py makes a mistake that must be found.
 */
#define FRAMES 4

chan queue = [FRAMES] of { byte };
bool awake;                    /* the loop's Waker is readable */
bool thread_awake;             /* the thread's is */
bool resubscribe;              /* asked for by the loop, done by the thread, both with the lock */
byte position;                 /* the loop has all frames below */
byte sent;                     /* the next frame of the subscription */
bool failed;

inline discard() {
    skip;
#ifndef KEEPS_OLD_FRAMES
    do :: queue ? _ :: empty(queue) -> break od
#endif
}

active proctype thread() {
end:
    do
    :: sent < FRAMES ->        /* a frame has come */
#ifdef WAKE_FIRST
        awake = true; queue ! sent; sent++
#else
        queue ! sent; sent++; awake = true
#endif
    :: thread_awake ->         /* _apply(); then the HELLO with the position */
        thread_awake = false;
        if
        :: resubscribe ->
#ifdef FLAG_FIRST
            resubscribe = false; discard();
#else
            discard(); resubscribe = false;
#endif
            sent = position
        :: else
        fi
    od
}

active proctype loop() {
    byte frame;
    do
    :: position == FRAMES -> break
    :: else ->
        awake;                 /* poll() */
        do                     /* next() until it returns None */
        :: resubscribe -> break
        :: else ->
            if
            :: nempty(queue)
            :: empty(queue) ->
                awake = false; /* Waker.clear() */
#ifdef NO_SECOND_LOOK
                break
#endif
            fi;
            if
            :: empty(queue) -> break
            :: queue ? frame ->
                assert(frame <= position);
                if
                :: frame < position            /* it has come twice */
                :: frame == position -> position++
                :: frame == position && !failed ->
                    failed = true; resubscribe = true; thread_awake = true
                fi
            fi
        od
    od
}
