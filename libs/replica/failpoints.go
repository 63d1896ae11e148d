package replica

import "github.com/landfall-dr/landfall/libs/failpoint"

// Failpoints, each just around its call to the store.
var (
	fpBeforeSegment    = failpoint.Register("replica/before-segment")
	fpAfterSegment     = failpoint.Register("replica/after-segment")
	fpBeforeManifest   = failpoint.Register("replica/before-manifest")
	fpAfterManifest    = failpoint.Register("replica/after-manifest")
	fpBeforeSequence   = failpoint.Register("replica/before-sequence")
	fpAfterSequence    = failpoint.Register("replica/after-sequence")
	fpBeforePageWrite  = failpoint.Register("replica/before-page-write")
	fpAfterPageWrite   = failpoint.Register("replica/after-page-write")
	fpBeforeCheckpoint = failpoint.Register("replica/before-checkpoint")
	fpAfterCheckpoint  = failpoint.Register("replica/after-checkpoint")
	fpBeforeRetention  = failpoint.Register("replica/before-retention")
	fpAfterRetention   = failpoint.Register("replica/after-retention")
	fpBeforeDelete     = failpoint.Register("replica/before-delete")
	fpAfterDelete      = failpoint.Register("replica/after-delete")
)
