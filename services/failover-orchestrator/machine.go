package failoverorchestrator

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// describedVersion is the version of vm.json (docs/formats/vhd-target.md).
const describedVersion = 1

// configVersion is the version of a stored configuration (docs/formats/config.md).
const configVersion = 1

// described is vm.json.
type described struct {
	Version     int                 `json:"version"`
	Failover    string              `json:"failover"`
	Lineage     string              `json:"lineage"`
	Point       uint64              `json:"point"`
	Sequence    replica.Seq         `json:"sequence"`
	CutTime     string              `json:"cut_time"`
	Consistency replica.Consistency `json:"consistency"`
	Machine     json.RawMessage     `json:"machine"`
}

// machineAt is the machine as it was at a point: the configuration stored with it, or present where it has none, with
// exactly the disks that the point holds, in the machine's order.
func machineAt(ctx context.Context, r *replica.Replica, m *replica.Manifest, present *typesv1.Machine) (*typesv1.Machine, error) {
	machine := &typesv1.Machine{}
	if m.Config != "" {
		raw, err := r.Config(ctx, m.Config)
		if err != nil {
			return nil, configError(err, "read the machine's configuration at point %d", m.Point)
		}
		var stored struct{ V int }
		err = json.Unmarshal(raw, &stored)
		if err == nil && stored.V != configVersion {
			err = fmt.Errorf("it is of version %d, this program reads %d", stored.V, configVersion)
		}
		if err == nil {
			err = (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, machine)
		}
		if err != nil {
			return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_MANIFEST_CORRUPT, err, "read the machine's configuration at point %d", m.Point)
		}
	} else if present != nil {
		machine = proto.CloneOf(present)
	}
	held := map[string]replica.Disk{}
	for _, d := range m.Disks {
		held[d.ID] = d
	}
	var disks []*typesv1.Disk
	for _, d := range machine.Disks {
		if h, ok := held[d.Id]; ok {
			delete(held, d.Id)
			d.SizeBytes = h.Size
			disks = append(disks, d)
		}
	}
	for _, d := range m.Disks { // what the configuration does not know
		if _, left := held[d.ID]; left {
			disks = append(disks, &typesv1.Disk{Id: d.ID, SizeBytes: d.Size})
		}
	}
	machine.Disks = disks
	return machine, nil
}

// describe is vm.json: the machine as it was at the point, with the files of its disks.
func describe(t target.Target, f *failoverv1.Failover, m *replica.Manifest, machine *typesv1.Machine) ([]byte, error) {
	machine = proto.CloneOf(machine)
	for _, d := range machine.Disks {
		d.Path, d.Format, d.ExportUri = t.DiskFile(d.Id), typesv1.DiskFormat_DISK_FORMAT_VHD, ""
	}
	body, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(machine)
	if err != nil {
		return nil, fmt.Errorf("encode machine: %w", err)
	}
	raw, err := json.MarshalIndent(described{
		Version: describedVersion, Failover: f.Name, Lineage: f.Lineage, Point: f.Point, Sequence: m.Seq,
		CutTime: m.CutTime.UTC().Format(time.RFC3339Nano), Consistency: m.Consistency, Machine: body,
	}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the machine's description: %w", err)
	}
	return append(raw, '\n'), nil
}
