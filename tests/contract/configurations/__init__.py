"""What dstack's own client makes of a configuration, and what ours does.

`official_client` runs in the Python of the server's environment, `clients` asks it and ours, `forms` generates
configurations from dstack's own schema, `named` holds those that a person wrote down.
"""
