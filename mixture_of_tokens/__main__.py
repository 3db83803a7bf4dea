"""`python -m mixture_of_tokens` is `mot`, for launchers such as torchrun."""

from mixture_of_tokens.cli import main

main()
