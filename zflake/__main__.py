"""`python -m zflake` is the `zflake` command."""

from zflake.cli.tool import main

if __name__ == "__main__":
    main()
