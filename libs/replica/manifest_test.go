package replica

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func sampleManifests() []Manifest {
	h := strings.Repeat("ab", 32)
	seg := Segment{Name: "seg/000000000007-0123456789abcdef/disk-a-0", Container: Journal, Bytes: 4096, SHA256: h}
	staged := seg
	staged.Container = Staging
	point := Manifest{Lineage: testLineage, Epoch: 3, Open: 2, Seq: 12, Prev: h, Kind: KindPoint, Point: 7, Base: 6, CutTime: testTime,
		Consistency: ConsistencyApp, Config: h, Host: "sites/one/hosts/h1", Trace: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		Disks: []Disk{{ID: "disk-a", Gen: 1, Size: 1 << 30, Segments: []Segment{seg}}, {ID: "disk-b", Gen: 2, Size: 512}}}
	base := point
	base.Kind = KindBase
	point.Signals = &Signals{Changed: 70 << 10, Zero: 4096, Stored: 4096, Incompressible: 64 << 10}
	all := []Manifest{point, base,
		{Lineage: testLineage, Epoch: 1, Seq: 1, Kind: KindPartial, Pass: &Pass{1, 2, 3}, Disks: []Disk{{ID: "disk-a", Gen: 1, Size: 1 << 30, Segments: []Segment{staged}}}},
		{Lineage: testLineage, Epoch: 3, Seq: 13, Prev: h, Kind: KindClose, Failover: "0b1c", Reason: "planned"},
		{Lineage: testLineage, Epoch: 3, Seq: 14, Prev: h, Kind: KindRewind, Base: 5, Failover: "0b1c", Disks: []Disk{{ID: "disk-a", Gen: 1, Size: 1 << 30, Segments: []Segment{seg}}}},
		{Lineage: testLineage, Epoch: 4, Seq: 15, Prev: h, Kind: KindOpen, Failover: "0b1c"},
	}
	for i := range all {
		all[i].V = ManifestVersion
	}
	return all
}

// TestManifestGolden pins the stored bytes of each kind: a change needs a new version.
func TestManifestGolden(t *testing.T) {
	var all bytes.Buffer
	for _, m := range sampleManifests() {
		b, err := m.Encode()
		require.NoError(t, err)
		all.Write(b)
		back, err := DecodeManifest(b)
		require.NoError(t, err)
		require.Equal(t, &m, back)
	}
	file := filepath.Join("testdata", "manifests-v2.jsonl")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(file, all.Bytes(), 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), all.String())
}

// TestManifestVersion1 pins what older writers stored: it is read, and its bytes, which the chain's hashes cover, stay.
func TestManifestVersion1(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("testdata", "manifests.jsonl"))
	require.NoError(t, err)
	want := sampleManifests()
	want[0].Signals = nil
	for i, line := range bytes.SplitAfter(bytes.TrimSuffix(raw, []byte("\n")), []byte("\n")) {
		line = append(bytes.TrimSuffix(line, []byte("\n")), '\n')
		m, err := DecodeManifest(line)
		require.NoError(t, err)
		want[i].V = 1
		require.Equal(t, &want[i], m)
		again, err := m.Encode()
		require.NoError(t, err)
		require.Equal(t, string(line), string(again))
		m.Signals = &Signals{}
		_, err = m.Encode()
		require.ErrorIs(t, err, ErrInvalid, "version 1 has no signals")
	}
}

func TestManifestRefusals(t *testing.T) {
	for name, change := range map[string]func(m *Manifest){
		"version":        func(m *Manifest) { m.V = 3 },
		"version 0":      func(m *Manifest) { m.V = 0 },
		"signals":        func(m *Manifest) { m.Signals = &Signals{Changed: -1} },
		"signals' parts": func(m *Manifest) { m.Signals = &Signals{Changed: 10, Zero: 6, Incompressible: 6} },
		"signals' size":  func(m *Manifest) { m.Signals = &Signals{Changed: 1 << 62, Zero: 1 << 62, Incompressible: 1 << 62} },
		"lineage":        func(m *Manifest) { m.Lineage = "x" },
		"seq 0":          func(m *Manifest) { m.Seq = 0 },
		"epoch 0":        func(m *Manifest) { m.Epoch = 0 },
		"open above":     func(m *Manifest) { m.Open = 12 },
		"no prev":        func(m *Manifest) { m.Prev = "" },
		"kind":           func(m *Manifest) { m.Kind = "bogus" },
		"point 0":        func(m *Manifest) { m.Point = 0 },
		"a pass too":     func(m *Manifest) { m.Pass = &Pass{1, 1, 1} },
		"base not below": func(m *Manifest) { m.Base = 7 },
		"failover":       func(m *Manifest) { m.Failover = "f" },
		"no cut time": func(m *Manifest) {
			m.CutTime = m.CutTime.AddDate(-9999, 0, 0).Add(-1 << 62)
			m.CutTime = (Manifest{}).CutTime
		},
		"consistency":      func(m *Manifest) { m.Consistency = "" },
		"config":           func(m *Manifest) { m.Config = "../../x" },
		"no disks":         func(m *Manifest) { m.Disks = nil },
		"disk twice":       func(m *Manifest) { m.Disks[1].ID = "disk-a" },
		"disk id":          func(m *Manifest) { m.Disks[0].ID = "../a" },
		"gen 0":            func(m *Manifest) { m.Disks[0].Gen = 0 },
		"size":             func(m *Manifest) { m.Disks[0].Size = 100 },
		"segment name":     func(m *Manifest) { m.Disks[0].Segments[0].Name = "seg/../x/y" },
		"segment's place":  func(m *Manifest) { m.Disks[0].Segments[0].Container = Staging },
		"segment's size":   func(m *Manifest) { m.Disks[0].Segments[0].Bytes = 65 << 20 },
		"segment's hash":   func(m *Manifest) { m.Disks[0].Segments[0].SHA256 = "AB" },
		"text without end": func(m *Manifest) { m.Reason = strings.Repeat("x", 2000) },
	} {
		m := sampleManifests()[0]
		change(&m)
		_, err := m.Encode()
		require.ErrorIs(t, err, ErrInvalid, name)
	}
	good, err := sampleManifestBytes(0)
	require.NoError(t, err)
	for name, b := range map[string][]byte{
		"unknown field": bytes.Replace(good, []byte(`"v":2`), []byte(`"v":2,"more":2`), 1),
		"unknown v":     bytes.Replace(good, []byte(`"v":2`), []byte(`"v":9`), 1),
		"no v":          bytes.Replace(good, []byte(`"v":2,`), nil, 1),
		"two objects":   append(bytes.Clone(good), good...),
		"not an object": []byte("[]"),
		"nothing":       nil,
	} {
		_, err := DecodeManifest(b)
		require.ErrorIs(t, err, ErrInvalid, name)
	}
}

func sampleManifestBytes(i int) ([]byte, error) {
	m := sampleManifests()[i]
	return m.Encode()
}

func FuzzManifest(f *testing.F) {
	for i := range sampleManifests() {
		b, err := sampleManifestBytes(i)
		require.NoError(f, err)
		f.Add(b)
	}
	old, err := os.ReadFile(filepath.Join("testdata", "manifests.jsonl"))
	require.NoError(f, err)
	for line := range bytes.Lines(old) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeManifest(b)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalid)
			return
		}
		again, err := m.Encode()
		require.NoError(t, err)
		back, err := DecodeManifest(again)
		require.NoError(t, err)
		x, _ := json.Marshal(m)
		y, _ := json.Marshal(back)
		require.Equal(t, string(x), string(y))
		var st State
		_, _ = st.admit(m, &bugs{}) // must not panic
	})
}

func FuzzCheckpoint(f *testing.F) {
	f.Add([]byte(`{"v":1,"lineage":"00112233445566778899aabbccddeeff","seq":3,"kind":"base","ordinal":2,"created":"2026-01-01T00:00:00Z","disks":[{"id":"disk-a","gen":1,"size":512,"snapshot":"1"}]}`))
	f.Add([]byte(`{"v":1,"lineage":"00112233445566778899aabbccddeeff","seq":3,"void":true,"created":"2026-01-01T00:00:00Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := DecodeCheckpoint(b); err != nil {
			require.ErrorIs(t, err, ErrInvalid)
		}
	})
}

func FuzzRetention(f *testing.F) {
	f.Add([]byte(`{"v":1,"lineage":"00112233445566778899aabbccddeeff","floor":0}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		ret, err := DecodeRetention(b)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalid)
			return
		}
		for s := range Seq(20) {
			if a, in := ret.anchorFor(s); in {
				require.True(t, s == 0 || a != nil)
			}
		}
	})
}

func TestParse(t *testing.T) {
	l, err := ParseLineage("00112233-4455-6677-8899-AABBCCDDEEFF")
	require.NoError(t, err)
	require.Equal(t, testLineage, l)
	for _, s := range []string{"", "x", "0011", strings.Repeat("g", 32)} {
		_, err := ParseLineage(s)
		require.ErrorIs(t, err, ErrInvalid)
	}
	n, err := ParseSeq("000000000012")
	require.NoError(t, err)
	require.Equal(t, Seq(12), n)
	for _, s := range []string{"", "-1", "1000000000000", "1e3"} {
		_, err := ParseSeq(s)
		require.ErrorIs(t, err, ErrInvalid)
	}
	for _, c := range []struct{ a, t Seq }{{0, 0}, {0, 1}, {7, 7}, {5, 5 + maxStep}, {MaxSeq - 1, MaxSeq}} {
		a, tt := splitNumber(joinNumber(c.a, c.t))
		require.Equal(t, []Seq{c.a, c.t}, []Seq{a, tt})
	}
}
