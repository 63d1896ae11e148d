package uploader

import "github.com/landfall-dr/landfall/libs/failpoint"

// The moments worth attacking. Those around single page writes, sequence numbers and segments inside storage calls
// are package replica's ("replica/before-page-write" and so on); the ones here stand around the whole step.
var (
	fpBeforeSegment    = failpoint.Register("uploader/before-segment")
	fpAfterSegment     = failpoint.Register("uploader/after-segment")
	fpBeforeManifest   = failpoint.Register("uploader/before-manifest")
	fpAfterManifest    = failpoint.Register("uploader/after-manifest")
	fpBeforePublish    = failpoint.Register("uploader/before-publish")
	fpAfterPublish     = failpoint.Register("uploader/after-publish")
	fpBeforeAck        = failpoint.Register("uploader/before-ack")
	fpBeforePageWrite  = failpoint.Register("uploader/before-page-write")
	fpAfterPageWrite   = failpoint.Register("uploader/after-page-write")
	fpBeforeCheckpoint = failpoint.Register("uploader/before-checkpoint")
	fpBeforeRetain     = failpoint.Register("uploader/before-retain")
	fpAfterRetain      = failpoint.Register("uploader/after-retain")
	fpAfterCheckpoint  = failpoint.Register("uploader/after-checkpoint")
)
