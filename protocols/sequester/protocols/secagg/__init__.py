"""Secure aggregation, sans-I/O: specification in spec/secure-aggregation.md, version 1.

`messages` what is said, `keys` the key schedule, `shamir` shares, `masks` streams and sums, `member` the site's state
machine, `aggregator` the exchange's. A machine takes one message and returns effects, or raises; drivers perform
`Persist` before the `Send` that follows it.
"""
