"""The control plane behind core, nodes and Operator: one ROUTER at the core, typed messages, answered requests.

messages, arrays    what travels; validated on arrival
link, calls, recent, shipping     the side of a node or an Operator: connection, requests to it, log records
requests            the side of an Operator: what its methods return
peers, desk, forwarding           the core's view of who is there, who asks for what, and whom it is passed on to
runs, procedures, asks, instructions, reports     the run states, and what leads from one to the next
catalogue, deliveries             what is kept on disk, and what storages add to it when a run is over
space, words        how long a disk will last; what `status` says in words
"""
