"""`python -m mmad_cli` is `mmad`."""

from mmad_cli.cli import main

if __name__ == "__main__":
    main()
