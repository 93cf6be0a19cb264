"""What the allocator and OpenMP are told of a process that computes."""

ALLOCATOR_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
}
"""glibc and OpenMP read these when a process starts. With the first three freed pages are kept
instead of returned to the kernel, which made torch on CPU virtual machines 2.5 to 6 times faster.
With the fourth, threads that wait sleep: beside other busy processes spinning ones cost a factor
of 4 to 10. With the last, GNU's first spin for some 10 microseconds, about the time between two
small operations: decoding takes an eighth less on an idle machine and no more on a busy one."""
