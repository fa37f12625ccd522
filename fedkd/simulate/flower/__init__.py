"""The only importers of flwr: records, the client app, the server app, the local grid."""
