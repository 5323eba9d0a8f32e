"""Readers of public data sets, one file each, imported when `python data.py NAME` asks for them.

A reader's file is named as its command (with a leading underscore if that begins with a digit). It defines

    SKELETON       HAND or HUMAN of support/folder.py; `compare` and `protocol` say how errors are averaged
    MAX_SKIPPED    optional: the share of samples that may be left out, 0.05 otherwise
    read(root, ..) its options have defaults and become flags; a Literal lists the choices of a flag

`read` returns the number of samples (or an upper bound) and a generator of `support.convert.Sample`. It
refuses a wrong layout before the first sample. The generator runs in one process before the workers do, so it
opens as little as it can. It does not yield what the publisher left unlabelled; a sample with damaged labels
gets a `fault`. The options `split` and `stride` have this meaning everywhere; `side` and `workers` are taken.
"""
