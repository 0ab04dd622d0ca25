"""The maths: one op family a file."""
