"""``python -m segdeconv``, which torchrun needs."""

from segdeconv.cli import main

main()
