"""The control plane behind core, nodes and Operator: one ROUTER at the core, typed messages, answered requests.

connection, node, log_shipping    the side of a component: connection, requests to it, log records
client                            the side of an Operator: what its methods return
registry, request_router          the core's view of who is there, who asks for what, and whom it is passed on to
run_control, run_instructions, scatter_gather, run_verdict     the run states and the transitions between them
catalogue                         what is kept on disk of every run
disk_watch, display               how long a disk will last; what `status` says in words
"""
