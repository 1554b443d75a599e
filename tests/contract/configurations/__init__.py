"""Configurations read by dstack's own client and by ours.

`official_client` runs in the Python of the server's environment, `clients` calls it and our client, `forms`
generates configurations from dstack's own schema, and `named` holds those written by hand.
"""
