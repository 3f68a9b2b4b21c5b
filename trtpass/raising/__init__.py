"""Raising rules, one family a file. Each takes a graph and returns (times applied, reasons for near misses)."""
