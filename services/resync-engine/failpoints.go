package resyncengine

import "github.com/landfall-dr/landfall/libs/failpoint"

// The moments worth attacking.
var (
	fpBeforeSegment  = failpoint.Register("resync-engine/before-segment")
	fpAfterSegment   = failpoint.Register("resync-engine/after-segment")
	fpBeforeManifest = failpoint.Register("resync-engine/before-manifest")
	fpAfterManifest  = failpoint.Register("resync-engine/after-manifest")
	fpBeforePublish  = failpoint.Register("resync-engine/before-publish")
	fpAfterPublish   = failpoint.Register("resync-engine/after-publish")
	fpBeforeAck      = failpoint.Register("resync-engine/before-ack")
)
