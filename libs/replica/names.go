package replica

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
)

// Names inside the containers. Sequence numbers and ordinals have twelve digits, so names sort as numbers.
const (
	logPrefix     = "log/"
	ckptPrefix    = "ckpt/"
	diskPrefix    = "disks/"
	retentionName = "retention.json"
	mapPrefix     = "idx/"
	segPrefix     = "seg/"
	configPrefix  = "config/"
	rewindPrefix  = "seg/rewind-" // rule 25: what a rewind stores is named by its failover
	jsonSuffix    = ".json"
)

func manifestName(s Seq) string   { return fmt.Sprintf("log/%012d.json", uint64(s)) }
func checkpointName(s Seq) string { return fmt.Sprintf("ckpt/%012d.json", uint64(s)) }
func configName(sha string) string {
	return "config/" + sha + jsonSuffix
}

// DiskBlobName is the page blob of one generation of a disk, in the replica container.
func DiskBlobName(diskID string, gen uint32) string {
	return fmt.Sprintf("disks/%s/g%04d.vhd", diskID, gen)
}

// seqOfName parses "<prefix><12 digits>.json".
func seqOfName(name, prefix string) (Seq, bool) {
	s, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return 0, false
	}
	s, ok = strings.CutSuffix(s, jsonSuffix)
	if !ok || len(s) != 12 {
		return 0, false
	}
	n, err := ParseSeq(s)
	return n, err == nil && n > 0
}

// Tx makes the segment names of one attempt its own: 16 random hex digits.
type Tx string

// NewTx returns a fresh Tx. Every attempt to ship a task takes a new one, a redelivered task too.
func NewTx() Tx {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return Tx(hex.EncodeToString(b[:]))
}

// SegmentKey places one segment: seg/<ordinal>-<tx>/<disk>-<k>, of a rewind seg/rewind-<failover>-<tx>/<disk>-<k>.
type SegmentKey struct {
	// Kind of the manifest that will name it: partials go to staging, all else to the journal.
	Kind Kind
	// Ordinal of the point or pass; not used for a rewind.
	Ordinal Ordinal
	// Failover of a rewind; not used for other kinds.
	Failover string
	Tx       Tx
	DiskID   string
	// K numbers the segments of the disk within the attempt, from 0.
	K int
}

func (k SegmentKey) name() string {
	if k.Kind == KindRewind {
		return fmt.Sprintf("%s%s-%s/%s-%d", rewindPrefix, k.Failover, k.Tx, k.DiskID, k.K)
	}
	return fmt.Sprintf("seg/%012d-%s/%s-%d", uint64(k.Ordinal), k.Tx, k.DiskID, k.K)
}

func (k SegmentKey) container() Container {
	if k.Kind == KindPartial {
		return Staging
	}
	return Journal
}

// validSegmentName accepts seg/<token>/<token>: rewinds name their attempt by failover instead of ordinal.
func validSegmentName(s string) bool {
	rest, ok := strings.CutPrefix(s, "seg/")
	if !ok {
		return false
	}
	attempt, file, ok := strings.Cut(rest, "/")
	return ok && validToken(attempt, 160) && validToken(file, 80)
}
