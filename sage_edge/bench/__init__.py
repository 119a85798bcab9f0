"""Benchmarks: everything compared within one run, interleaved, with medians and spread."""
