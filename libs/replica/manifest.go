package replica

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// ManifestVersion is the version of the manifest format this package writes. It reads this one and those before it.
const ManifestVersion = 2

// MaxManifest bounds a stored manifest, in bytes: about 12,000 segments.
const MaxManifest = 4 << 20

// Manifest is log/<seq>.json: its existence commits what it names. It is never changed.
// docs/formats/manifest.md describes every field.
type Manifest struct {
	V       int     `json:"v"`
	Lineage Lineage `json:"lineage"`
	Epoch   Epoch   `json:"epoch"`
	// Open is the number of the newest open manifest under which the task was issued; 0 when there was none.
	Open Seq `json:"open"`
	Seq  Seq `json:"seq"`
	// Prev is the SHA-256 of the bytes of manifest Seq-1, hex; empty for the first.
	Prev string `json:"prev"`
	Kind Kind   `json:"kind"`
	// Point is the ordinal of a base or point.
	Point Ordinal `json:"point,omitempty"`
	// Pass is the task of a partial.
	Pass *Pass `json:"pass,omitempty"`
	// Base is the ordinal whose state the host says this builds on; for a rewind, its target.
	Base Ordinal `json:"base"`
	// Failover is the id of the failover of a close, rewind or open.
	Failover string `json:"failover,omitempty"`
	// CutTime is taken by the scheduler's clock before the cut, UTC; zero when nothing was cut.
	CutTime     time.Time   `json:"cut_time,omitzero"`
	Consistency Consistency `json:"consistency,omitempty"`
	// Config is the SHA-256 of the VM configuration, hex: config/<sha256>.json.
	Config string `json:"config,omitempty"`
	// Signals say what the changes of a base or point looked like; nil when whoever shipped it did not say. From version 2.
	Signals *Signals `json:"signals,omitempty"`
	// Disks are all disks of the VM in a base or point; in a partial or rewind at least those with segments.
	Disks  []Disk `json:"disks,omitempty"`
	Host   string `json:"host,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Trace is the W3C traceparent of the cycle.
	Trace string `json:"trace,omitempty"`
}

// Ordinal is the point's or pass's ordinal; 0 for rewind, close and open.
func (m *Manifest) Ordinal() Ordinal {
	if m.Pass != nil {
		return m.Pass.Ordinal
	}
	return m.Point
}

// Encode returns the stored bytes, after Validate. Equal manifests give equal bytes.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	b = append(b, '\n')
	if len(b) > MaxManifest {
		return nil, fmt.Errorf("encode manifest: %d bytes, at most %d: %w", len(b), MaxManifest, ErrInvalid)
	}
	return b, nil
}

// DecodeManifest reads a stored manifest strictly: an unknown version or field, trailing data and
// anything Validate refuses are errors (ErrInvalid).
func DecodeManifest(b []byte) (*Manifest, error) {
	var m Manifest
	if err := decodeVersions(b, MaxManifest, 1, ManifestVersion, &m); err != nil {
		return nil, fmt.Errorf("decode manifest: %w", err)
	}
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("decode manifest: %w", err)
	}
	return &m, nil
}

// decodeStrict decodes one JSON object with a field "v" equal to version, no unknown fields and nothing after it.
func decodeStrict(b []byte, limit, version int, into any) error {
	return decodeVersions(b, limit, version, version, into)
}

// decodeVersions is decodeStrict for the versions oldest to newest.
func decodeVersions(b []byte, limit, oldest, newest int, into any) error {
	if len(b) > limit {
		return fmt.Errorf("%d bytes, at most %d: %w", len(b), limit, ErrInvalid)
	}
	var head struct {
		V *int `json:"v"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if head.V == nil || *head.V < oldest || *head.V > newest {
		return fmt.Errorf("format version is not from %d to %d: %w", oldest, newest, ErrInvalid)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("data after the object: %w", ErrInvalid)
	}
	return nil
}

// hashHex is the SHA-256 of b in lower-case hex.
func hashHex(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// Bounds of a manifest's fields.
const (
	maxDisks    = 64
	maxText     = 1024
	maxState    = 256
	maxPassK    = 1 << 20
	maxFailover = 128      // bytes of a failover id
	maxDiskSize = 64 << 40 // the largest VHDX, 64 TiB
)

// Validate checks every rule of the format that needs no other manifest.
func (m *Manifest) Validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("manifest %d: "+format+": %w", append(append([]any{m.Seq}, a...), ErrInvalid)...)
	}
	switch {
	case m.V < 1 || m.V > ManifestVersion:
		return bad("version %d", m.V)
	case !isHex(string(m.Lineage), 32):
		return bad("lineage %q", m.Lineage)
	case m.Seq == 0 || m.Seq > MaxSeq:
		return bad("sequence number out of range")
	case m.Epoch == 0 || m.Epoch > 1<<62:
		return bad("epoch %d", m.Epoch)
	case m.Open >= m.Seq:
		return bad("open %d is not below it", m.Open)
	case (m.Seq == 1) != (m.Prev == ""), m.Prev != "" && !isHex(m.Prev, 64):
		return bad("prev %q", m.Prev)
	case m.Config != "" && !isHex(m.Config, 64):
		return bad("config %q", m.Config)
	case len(m.Host) > maxText, len(m.Reason) > maxText, len(m.Trace) > maxText:
		return bad("host, reason or trace is longer than %d bytes", maxText)
	case m.Point > 1<<62, m.Base > 1<<62:
		return bad("ordinal out of range")
	}
	if err := m.validateKind(bad); err != nil {
		return err
	}
	if m.Signals != nil {
		if m.V < 2 || !m.Kind.IsPoint() {
			return bad("signals in a %s of version %d", m.Kind, m.V)
		}
		if err := m.Signals.Validate(); err != nil {
			return bad("%w", err)
		}
	}
	if len(m.Disks) > maxDisks {
		return bad("%d disks, at most %d", len(m.Disks), maxDisks)
	}
	seen := make(map[string]bool, len(m.Disks))
	for i := range m.Disks {
		d := &m.Disks[i]
		if seen[d.ID] {
			return bad("disk %q twice", d.ID)
		}
		seen[d.ID] = true
		if err := d.validate(m.Kind); err != nil {
			return bad("%w", err)
		}
	}
	return nil
}

func (m *Manifest) validateKind(bad func(string, ...any) error) error {
	wantPoint, wantPass, wantFailover := m.Kind.IsPoint(), m.Kind == KindPartial, m.Kind.IsFence() || m.Kind == KindRewind
	switch m.Kind {
	case KindBase, KindPoint, KindPartial, KindRewind, KindClose, KindOpen:
	default:
		return bad("kind %q", m.Kind)
	}
	switch {
	case (m.Point != 0) != wantPoint:
		return bad("kind %s with point ordinal %d", m.Kind, m.Point)
	case (m.Pass != nil) != wantPass:
		return bad("kind %s: pass present %t", m.Kind, m.Pass != nil)
	case wantFailover != (m.Failover != ""), m.Failover != "" && !validToken(m.Failover, maxFailover):
		return bad("kind %s with failover %q", m.Kind, m.Failover)
	case wantPoint && m.CutTime.IsZero(), !wantPoint && !m.CutTime.IsZero():
		return bad("kind %s: cut time present %t", m.Kind, !m.CutTime.IsZero())
	case wantPoint && m.Consistency != ConsistencyCrash && m.Consistency != ConsistencyApp,
		!wantPoint && m.Consistency != ConsistencyNone:
		return bad("kind %s with consistency %q", m.Kind, m.Consistency)
	case m.Kind == KindRewind && m.Base == 0:
		return bad("rewind without a target")
	case m.Kind.IsFence() && (len(m.Disks) > 0 || m.Base != 0):
		return bad("a fence carries no data")
	case wantPoint && len(m.Disks) == 0:
		return bad("kind %s without disks", m.Kind)
	}
	if wantPass {
		p := m.Pass
		if p.Ordinal == 0 || p.Ordinal > 1<<62 || p.K == 0 || p.K > maxPassK || p.I == 0 || p.I > p.K {
			return bad("pass %d, task %d of %d", p.Ordinal, p.I, p.K)
		}
	}
	if o := m.Ordinal(); o != 0 && m.Base >= o {
		return bad("base %d is not below ordinal %d", m.Base, o)
	}
	return nil
}

func (d *Disk) validate(kind Kind) error {
	switch {
	case !validToken(d.ID, 64) || strings.ContainsAny(d.ID, "._") || strings.ToLower(d.ID) != d.ID:
		return fmt.Errorf("disk id %q", d.ID)
	case d.Gen == 0 || d.Gen > 9999:
		return fmt.Errorf("disk %s: generation %d", d.ID, d.Gen)
	case d.Size <= 0 || d.Size%512 != 0 || d.Size > maxDiskSize:
		return fmt.Errorf("disk %s: size %d", d.ID, d.Size)
	case len(d.State) > maxState:
		return fmt.Errorf("disk %s: state longer than %d bytes", d.ID, maxState)
	}
	want := Journal
	if kind == KindPartial {
		want = Staging
	}
	for _, s := range d.Segments {
		switch {
		case s.Container != want:
			return fmt.Errorf("disk %s: segment in %q, a %s keeps its segments in %s", d.ID, s.Container, kind, want)
		case !validSegmentName(s.Name):
			return fmt.Errorf("disk %s: segment name %q", d.ID, s.Name)
		case s.Bytes <= 0 || s.Bytes > 64<<20:
			return fmt.Errorf("disk %s: segment of %d bytes", d.ID, s.Bytes)
		case !isHex(s.SHA256, 64):
			return fmt.Errorf("disk %s: segment hash %q", d.ID, s.SHA256)
		}
	}
	return nil
}

// validToken reports whether s is 1 to n of [A-Za-z0-9._-] and not a relative path step.
func validToken(s string, n int) bool {
	if s == "" || len(s) > n || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		c := s[i]
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
		if !ok {
			return false
		}
	}
	return true
}
