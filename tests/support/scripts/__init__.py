"""Programs that tests start, and the job of a sweep over one."""
