package failoverorchestrator

// What gives errors of storage their reason, by what was being done.
var (
	ReplicaError = replicaError
	ConfigError  = configError
	CloseError   = closeError
	StoreError   = storeError
)
