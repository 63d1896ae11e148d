package catalogue

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// VM is one protection of one machine. Nothing in it depends on where the machine is recovered.
type VM struct {
	Site string `json:"site"`
	// ID is the hypervisor's GUID.
	ID          string `json:"vm"`
	DisplayName string `json:"display_name"`
	// Lineage is 32 hex digits.
	Lineage string `json:"lineage"`
	// Host is the resource name of the host that holds the source.
	Host string `json:"host,omitempty"`
	// Policy is the resource name of the policy.
	Policy string `json:"policy,omitempty"`
	// Created is when protection was enabled, scheduler's clock.
	Created time.Time `json:"created,omitzero"`
}

// Name is the VM's resource name.
func (v *VM) Name() string { return "sites/" + v.Site + "/vms/" + v.ID }

// Record is one record of the catalogue: exactly one of VM, Policy and Plan is set.
type Record struct {
	// Revision counts the writes of this record, from 1. It is the catalogue's own, not the one of the bucket.
	Revision uint64
	// Written is when it was written, writer's clock.
	Written time.Time
	// Ended is when the protection ended, or the policy or plan was deleted; zero while it has not.
	Ended time.Time

	VM     *VM
	Policy *schedulerv1.Policy
	Plan   *failoverv1.RecoveryPlan
}

// VMName is the blob of a protection.
func VMName(site, vm, lineage string) string {
	return "sites/" + site + "/vms/" + vm + "/" + lineage + ".json"
}

// PolicyName is the blob of a policy, given by its id or resource name.
func PolicyName(policy string) string { return "policies/" + last(policy) + ".json" }

// PlanName is the blob of a plan, given by its id or resource name.
func PlanName(plan string) string { return "plans/" + last(plan) + ".json" }

func last(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// Name is the blob that holds the record.
func (r *Record) Name() string {
	switch {
	case r.VM != nil:
		return VMName(r.VM.Site, r.VM.ID, r.VM.Lineage)
	case r.Policy != nil:
		return PolicyName(r.Policy.GetName())
	default:
		return PlanName(r.Plan.GetName())
	}
}

// same says whether two records say the same, whenever they were written. Revisions of buckets do not count.
func (r *Record) same(o *Record) bool {
	if !r.Ended.Equal(o.Ended) || (r.VM == nil) != (o.VM == nil) {
		return false
	}
	if r.VM != nil && (*r.VM != *o.VM) {
		a, b := *r.VM, *o.VM
		equal := a.Created.Equal(b.Created)
		a.Created, b.Created = time.Time{}, time.Time{}
		if !equal || a != b {
			return false
		}
	}
	return proto.Equal(r.Policy, o.Policy) && proto.Equal(r.Plan, o.Plan)
}

// stored is the record as it is in storage.
type stored struct {
	V        int             `json:"v"`
	Revision uint64          `json:"revision"`
	Written  time.Time       `json:"written"`
	Ended    time.Time       `json:"ended,omitzero"`
	VM       *VM             `json:"vm,omitempty"`
	Policy   json.RawMessage `json:"policy,omitempty"`
	Plan     json.RawMessage `json:"plan,omitempty"`
}

var (
	sitePattern    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)
	vmPattern      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	lineagePattern = regexp.MustCompile(`^[0-9a-f]{32}$`)
	namePattern    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)
)

// Validate checks what every record keeps to.
func (r *Record) Validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, ErrInvalid)...)
	}
	count := 0
	for _, set := range []bool{r.VM != nil, r.Policy != nil, r.Plan != nil} {
		if set {
			count++
		}
	}
	switch {
	case count != 1:
		return bad("%d of vm, policy and plan are there, not one", count)
	case r.Revision == 0:
		return bad("no revision")
	case r.VM != nil && !sitePattern.MatchString(r.VM.Site):
		return bad("site %q", r.VM.Site)
	case r.VM != nil && !vmPattern.MatchString(r.VM.ID):
		return bad("vm %q", r.VM.ID)
	case r.VM != nil && !lineagePattern.MatchString(r.VM.Lineage):
		return bad("lineage %q", r.VM.Lineage)
	case r.VM != nil && (len(r.VM.DisplayName) > 1024 || len(r.VM.Host) > 1024 || len(r.VM.Policy) > 1024):
		return bad("a name of more than 1,024 bytes")
	case r.Policy != nil && (r.Policy.GetName() != "policies/"+last(r.Policy.GetName()) || !namePattern.MatchString(last(r.Policy.GetName()))):
		return bad("policy %q", r.Policy.GetName())
	case r.Plan != nil && (r.Plan.GetName() != "recoveryPlans/"+last(r.Plan.GetName()) || !namePattern.MatchString(last(r.Plan.GetName()))):
		return bad("plan %q", r.Plan.GetName())
	}
	return nil
}

// Encode returns the stored bytes, after Validate.
func (r *Record) Encode() ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	s := stored{V: Version, Revision: r.Revision, Written: r.Written.UTC(), VM: r.VM}
	if !r.Ended.IsZero() {
		s.Ended = r.Ended.UTC()
	}
	var err error
	if r.Policy != nil {
		s.Policy, err = body(r.Policy)
	} else if r.Plan != nil {
		s.Plan, err = body(r.Plan)
	}
	var b []byte
	if err == nil {
		b, err = json.MarshalIndent(s, "", "  ")
	}
	if err != nil {
		return nil, fmt.Errorf("encode catalogue record %s: %w", r.Name(), err)
	}
	if len(b) >= maxRecord {
		return nil, fmt.Errorf("encode catalogue record %s: %d bytes, at most %d: %w", r.Name(), len(b), maxRecord, ErrInvalid)
	}
	return append(b, '\n'), nil
}

func body(m proto.Message) (json.RawMessage, error) {
	return protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
}

// Decode reads a stored record strictly: another version (ErrNewer when it is above this one), an unknown member of the
// envelope, or data after it is an error. Members of a policy or plan that this program does not know are ignored: they
// are added without another version.
func Decode(raw []byte) (*Record, error) {
	bad := func(err error) error { return fmt.Errorf("%w: %w", ErrInvalid, err) }
	if len(raw) > maxRecord {
		return nil, fmt.Errorf("%d bytes, at most %d: %w", len(raw), maxRecord, ErrInvalid)
	}
	var head struct {
		V *int `json:"v"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, bad(err)
	}
	switch {
	case head.V == nil || *head.V < 1:
		return nil, fmt.Errorf("no format version: %w", ErrInvalid)
	case *head.V > Version:
		return nil, fmt.Errorf("version %d, this program reads %d: %w", *head.V, Version, ErrNewer)
	}
	var s stored
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return nil, bad(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("data after the object: %w", ErrInvalid)
	}
	r := &Record{Revision: s.Revision, Written: s.Written, Ended: s.Ended, VM: s.VM}
	lenient := protojson.UnmarshalOptions{DiscardUnknown: true}
	if len(s.Policy) > 0 {
		r.Policy = &schedulerv1.Policy{}
		if err := lenient.Unmarshal(s.Policy, r.Policy); err != nil {
			return nil, bad(err)
		}
	}
	if len(s.Plan) > 0 {
		r.Plan = &failoverv1.RecoveryPlan{}
		if err := lenient.Unmarshal(s.Plan, r.Plan); err != nil {
			return nil, bad(err)
		}
	}
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return r, nil
}
