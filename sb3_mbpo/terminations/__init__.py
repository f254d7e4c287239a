"""When imagined episodes end: known rules, and a learned one."""
