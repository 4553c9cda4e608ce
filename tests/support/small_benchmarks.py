"""Options that make benchmarks small."""

EXPERTS = ("--experts=4", "--hidden=64", "--intermediate=128", "--tokens=8", "--top=2", "--rank=4")
ROOFLINE = ("--shapes", "8x64x64", "--memory-mib", "1", "--cache-kib", "16", "--matrix", "32", "--stack-mib", "1")
