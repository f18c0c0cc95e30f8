"""The control plane between core, components and Operators: typed messages, and requests that are always answered.

connection, node, log_shipping    in a component: connection to the core, requests from it, log records
client                            in an Operator: the Requests that its methods return
registry, request_router          in the core: components, Operators and control; the way of requests and answers
run_control, run_instructions, scatter_gather, run_verdict     the run states and the transitions between them
catalogue                         the database of all runs
alarms, alarm_delivery            alarm conditions and open alarms; commands, webhooks and mail that get them
disk_watch, display, prompt       warnings about full disks; `status` and results as text; alarms in IPython
"""
