"""Quantised weights in files, one form each: names and bytes in, lazy values (and codes) out."""
