"""Tasks with tools, structured errors and graded rewards."""
