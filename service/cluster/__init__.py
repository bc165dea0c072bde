"""Several models and replicas behind one address, on Ray Serve.

Only this package imports Ray. `config` reads the file, `deployments` is what runs in Ray's
processes, `front` chooses the model of a request, `command` starts, updates and ends all of it.
"""
