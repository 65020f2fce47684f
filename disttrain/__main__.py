"""`python -m disttrain` is the command `disttrain`."""

from disttrain.cli.app import main

if __name__ == "__main__":
    main()
