package replica

// bugs are switches that break one invariant each. They exist so that the model test can show that it would
// notice; only tests in this package can set them.
type bugs struct {
	ProgressBeforePages        bool // I10: at rest is set before the pages
	BatchMarkWithoutLowerBound bool // I10: a redo believes that all but the last manifest of the batch is applied
	NoLeaseNoNumber            bool // I11: writes carry neither lease id nor number
	CheckpointUnfinished       bool // I14: a checkpoint does not ask whether the disks are at rest
	ManifestBeforeSegments     bool // I1
	StaleTask                  bool // I3: the ordinal of a point is not compared
	NoPassOrdinal              bool // I4, I6: the ordinal of a pass is neither compared nor looked up
	HalfPass                   bool // I5: the first task completes a pass
	SelfRaisedEpoch            bool // I3: the worker takes the head's epoch when its own is lower
	NoEpoch, NoOpen            bool // I3: the epoch rule off, the open rule off
	NoBaseRule                 bool // I3: the base may be ahead of the state ordinal
	ReopenAnywhere             bool // I22: the open follows whatever head there is
	RewindNotComputedAgain     bool // I18: a rewind follows whatever head there is
	RewindSkipsPartials        bool // I20: what only a pass changed is not set back
	RewindSkipsRewinds         bool // I20: what an earlier rewind changed is not set back
	RewindTrustsAnyRewind      bool // I21: any rewind of the failover counts as this one
	AnyFence                   bool // I9: any failover may rewind and open
	SnapshotAnyETag            bool // I14: the disk may have moved between the look and the snapshot
	NumberBeforeLease          bool // I11: the number is read before the lease is taken
	RefillCounts               bool // I7: a number is a commit although it is retired
	FloorAfterDeletion         bool // rule 24: what the next record retires is deleted before it is put
	NoRetiredRanges            bool // rule 24: manifests between kept points are deleted, and the record does not say so
	PinIgnored                 bool // rule 24: retention does not look at pins
	LostRaceDeletes            bool // rule 24: a record that lost its race is deleted by all the same
	NoIfMatch                  bool // rule 24: the record replaces whatever version is there
	OrphansByAge               bool // rule 25: an old segment that no manifest names is an orphan whatever its ordinal
	RewindOrphansAnytime       bool // rule 25: those of a rewind too, while its close is the newest fence
	StagingEarly               bool // rule 15: staging goes once the pass is over, applied or not
	SnapshotWithoutVoid        bool // I15: an unnamed snapshot is deleted without a void record
}
