"""Runs beside each other: one picture, one table, one page, and reference curves of others."""
