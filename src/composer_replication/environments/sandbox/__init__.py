"""Model-written code: confined by the kernel, judged by tests that it never sees."""
