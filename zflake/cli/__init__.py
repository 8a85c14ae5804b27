"""The commands: `zflake`, `zflake-delegator`, `zflake-worker`.

conduct.py    what all three share: one line for an error, exit codes, log formats
options.py    values on the command line, in the environment and in TOML files
delegator.py  worker.py   the daemons' commands
tool.py       `zflake` and its short commands
ask.py        one request to one daemon; ids.py: IDs as text
status.py  trace.py  store.py  bench.py   what these commands ask and show
up.py         `zflake up`: a whole cluster on one machine
children.py   its daemons as child processes; display.py: how it shows them
"""
