"""Options that make benchmarks small."""

EXPERTS = (
    "--experts=4",
    "--hidden=64",
    "--intermediate=128",
    "--tokens=8",
    "--top=2",
    "--rank=4",
    "--implementation=grouped_mm",
    "--implementation=eager",
)
ROOFLINE = ("--shapes", "8x64x64", "--memory-mib", "1", "--cache-kib", "16", "--matrix", "32", "--stack-mib", "1")
CURVES = ("--of-rank", "2,4", "--of-tokens", "3", "--of-width", "16,24", "--tokens", "5", "--width", "8")
