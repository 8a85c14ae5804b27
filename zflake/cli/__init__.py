"""The commands: `zflake`, `zflake-delegator`, `zflake-worker`.

conduct.py    what all three share: one line for an error, exit codes, log formats
options.py    values on the command line, in the environment and in TOML files
delegator.py  worker.py   the daemons' commands
tool.py       `zflake` and its short commands
up.py         `zflake up`: a whole cluster on one machine
status.py     what `zflake status` asks and shows
"""
