"""The producer's child process, in which the chips are configured and routines run; larpix-control lives only here."""
