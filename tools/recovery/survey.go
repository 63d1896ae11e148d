package recovery

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/catalogue"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// Options of a Session. Store is required.
type Options struct {
	// Store is the account. Rights to read are enough, except for taking over.
	Store blobstore.Store
	// Targets are the recovery targets by kind.
	Targets map[failoverv1.TargetKind]target.Target
	// Parallel is how many lineages are read, or machines of a group brought up, at once; 4 by default.
	Parallel int
	// Ranges is how many ranges of a disk are read at once; 4 by default.
	Ranges int
	// Host is what the close says about who took over; "" is nothing.
	Host string
	Now  func() time.Time
}

// Session reads one store. It is safe for concurrent use.
type Session struct {
	store   blobstore.Store
	o       Options
	targets map[failoverv1.TargetKind]target.Target
}

// New returns a session; nothing is read.
func New(o Options) *Session {
	if o.Parallel == 0 {
		o.Parallel = 4
	}
	if o.Ranges == 0 {
		o.Ranges = 4
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Session{store: o.Store, o: o, targets: o.Targets}
}

// State of a lineage, as storage says.
type State string

// The states of a lineage.
const (
	// StateOpen: the source may still commit.
	StateOpen State = "open"
	// StateClosed: a failover has closed it; nothing of the source counts any more.
	StateClosed State = "closed"
	// StateEnded: its protection ended.
	StateEnded State = "ended"
	// StateDamaged: a manifest of its chain is missing or wrong; the points below it can be recovered. Problem says what is wrong.
	StateDamaged State = "damaged"
	// StateUnreadable: its chain cannot be read; Problem says why.
	StateUnreadable State = "unreadable"
)

// Point is one recovery point.
type Point struct {
	Ordinal     uint64    `json:"ordinal"`
	Sequence    uint64    `json:"sequence"`
	CutTime     time.Time `json:"cut_time"`
	Consistency string    `json:"consistency"`
	// State is received, processed (in the replica's disks) or checkpointed (a snapshot holds exactly it).
	State string `json:"state"`
	// Bytes that its segments take in the journal.
	Bytes int64 `json:"bytes"`
	// Pins are who keeps it.
	Pins []string `json:"pins"`
}

// Protection is one lineage and whom it belongs to.
type Protection struct {
	// VM is its resource name; "" when neither catalogue nor configuration says.
	VM          string `json:"vm"`
	DisplayName string `json:"display_name"`
	Lineage     string `json:"lineage"`
	// Catalogued says that the catalogue knows it.
	Catalogued bool   `json:"catalogued"`
	Host       string `json:"host"`
	Policy     string `json:"policy"`
	// Created and Ended are the catalogue's.
	Created *time.Time `json:"created"`
	Ended   *time.Time `json:"ended"`

	State State `json:"state"`
	// Failover is whose close is the newest fence.
	Failover string `json:"failover"`
	Points   int    `json:"points"`
	Newest   *Point `json:"newest"`
	Problem  string `json:"problem"`

	err error // behind Problem
}

// Site is the site in the VM's name.
func (p *Protection) Site() string {
	if parts := strings.Split(p.VM, "/"); len(parts) == 4 {
		return parts[1]
	}
	return ""
}

// ID is the VM's GUID.
func (p *Protection) ID() string { return p.VM[strings.LastIndexByte(p.VM, '/')+1:] }

// Title is what to call it: the display name, the id, or the lineage.
func (p *Protection) Title() string { return cmp.Or(p.DisplayName, p.ID(), p.Lineage) }

// Survey is what a store holds.
type Survey struct {
	Protections []*Protection
	Policies    []*schedulerv1.Policy
	Plans       []*failoverv1.RecoveryPlan
	// Warnings are what could not be read and stops nothing.
	Warnings []string
}

// Survey lists everything that the store holds, by site, name and age. progress, when set, hears how many lineages of how
// many have been read.
func (s *Session) Survey(ctx context.Context, progress func(done, total int)) (*Survey, error) {
	out, err := s.identify(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.each(ctx, out.Protections, progress, func(ctx context.Context, p *Protection) { s.inspect(ctx, p) }); err != nil {
		return nil, err
	}
	slices.SortStableFunc(out.Protections, func(a, b *Protection) int {
		return cmp.Or(cmp.Compare(a.Site(), b.Site()), cmp.Compare(strings.ToLower(a.Title()), strings.ToLower(b.Title())), newerFirst(a, b))
	})
	return out, nil
}

// each does work on protections, a bounded number at once.
func (s *Session) each(ctx context.Context, all []*Protection, progress func(done, total int), do func(context.Context, *Protection)) error {
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(2 * s.o.Parallel)
	ended := make(chan struct{}, len(all))
	for _, p := range all {
		group.Go(func() error {
			do(gctx, p)
			ended <- struct{}{}
			if progress != nil {
				progress(len(ended), len(all))
			}
			return gctx.Err()
		})
	}
	if err := group.Wait(); err != nil {
		return storeError(err, "read the lineages")
	}
	return ctx.Err()
}

// newerFirst orders the lineages of one VM: open ones, then the newest.
func newerFirst(a, b *Protection) int {
	open := func(p *Protection) int {
		switch p.State {
		case StateOpen:
			return 0
		case StateClosed:
			return 1
		case StateEnded:
			return 2
		}
		return 3
	}
	age := func(p *Protection) time.Time {
		switch {
		case p.Newest != nil:
			return p.Newest.CutTime
		case p.Created != nil:
			return *p.Created
		}
		return time.Time{}
	}
	return cmp.Or(cmp.Compare(open(a), open(b)), age(b).Compare(age(a)), cmp.Compare(a.Lineage, b.Lineage))
}

// identify finds the lineages and whom they belong to. The chains of those that the catalogue knows are not read.
func (s *Session) identify(ctx context.Context) (*Survey, error) {
	out := &Survey{}
	contents, err := catalogue.Open(s.store).List(ctx, "")
	if err != nil {
		if refused(err) {
			return nil, storeError(err, "read the catalogue")
		}
		contents = &catalogue.Contents{}
		out.Warnings = append(out.Warnings, "the catalogue cannot be read; machines are named by their newest points, policies and plans are not known: "+err.Error())
	}
	for _, p := range contents.Problems {
		out.Warnings = append(out.Warnings, p.Err.Error())
	}
	byLineage := map[string]*Protection{}
	for _, r := range contents.Records {
		switch {
		case r.VM != nil:
			p := &Protection{VM: r.VM.Name(), DisplayName: r.VM.DisplayName, Lineage: r.VM.Lineage, Catalogued: true, Host: r.VM.Host, Policy: r.VM.Policy}
			if !r.VM.Created.IsZero() {
				p.Created = &r.VM.Created
			}
			if !r.Ended.IsZero() {
				p.Ended = &r.Ended
			}
			byLineage[p.Lineage] = p
			out.Protections = append(out.Protections, p)
		case !r.Ended.IsZero(): // deleted
		case r.Policy != nil:
			out.Policies = append(out.Policies, r.Policy)
		case r.Plan != nil:
			out.Plans = append(out.Plans, r.Plan)
		}
	}
	var strangers []*Protection
	for l, err := range replica.Lineages(ctx, s.store) {
		if errors.Is(err, blobstore.ErrPermission) && len(out.Protections) > 0 {
			out.Warnings = append(out.Warnings, "these credentials may not list containers: only what the catalogue knows is found")
			break
		}
		if err != nil {
			return nil, storeError(err, "list the lineages")
		}
		if byLineage[string(l)] == nil {
			p := &Protection{Lineage: string(l)}
			strangers = append(strangers, p)
			out.Protections = append(out.Protections, p)
		}
	}
	if len(out.Protections) == 0 && len(contents.Problems) == 0 && len(contents.Records) == 0 {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING, "this store holds nothing of Landfall: there is no container lfj-… and no catalogue in it")
	}
	return out, s.each(ctx, strangers, nil, s.name)
}

// refused says that the store itself does not let us in: then nothing else can be read either.
func refused(err error) bool {
	return errors.Is(err, blobstore.ErrCredentials) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// name finds out whom a lineage belongs to from the configuration of its newest point that has one.
func (s *Session) name(ctx context.Context, p *Protection) {
	r, _, err := replica.OpenDamaged(ctx, s.store, replica.Lineage(p.Lineage))
	if err != nil {
		return // inspect says so
	}
	points, err := r.Points(ctx)
	if err != nil {
		return
	}
	for tries := 0; len(points) > 0 && tries < 3; tries++ {
		newest := points[len(points)-1]
		points = points[:len(points)-1]
		m, err := r.Find(ctx, newest.Ordinal)
		if err != nil || m.Config == "" {
			continue
		}
		machine, err := failoverorchestrator.MachineAt(ctx, r, m, nil)
		if err == nil && machine.GetName() != "" {
			p.VM, p.DisplayName, p.Host = machine.GetName(), machine.GetDisplayName(), machine.GetHost()
			return
		}
	}
}

// endFence begins the failover in the close that ends a protection (services/scheduler).
const endFence = "disable-"

// inspect reads the chain of a lineage. What is wrong with it is in the result: one damaged lineage hides no other.
func (s *Session) inspect(ctx context.Context, p *Protection) {
	_, points, err := s.open(ctx, p)
	if err != nil {
		p.State, p.err, p.Problem = StateUnreadable, err, reasonText(err)
		if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING) && p.Ended != nil {
			p.State, p.Problem = StateEnded, "its storage was deleted"
		}
		return
	}
	p.Points = len(points)
	if p.Points > 0 {
		n := point(points[len(points)-1], nil)
		p.Newest = &n
	}
}

// open reads a lineage's chain and sets the protection's state.
func (s *Session) open(ctx context.Context, p *Protection) (*replica.Replica, []replica.Point, error) {
	lineage := replica.Lineage(p.Lineage)
	r, damage, err := replica.OpenDamaged(ctx, s.store, lineage)
	if err != nil {
		return nil, nil, s.chainError(ctx, lineage, err, "read the chain of %s", p.Title())
	}
	points, err := r.Points(ctx)
	if err != nil {
		return nil, nil, s.chainError(ctx, lineage, err, "list the points of %s", p.Title())
	}
	state, err := r.Refresh(ctx)
	if err != nil {
		return nil, nil, s.chainError(ctx, lineage, err, "read the chain of %s", p.Title())
	}
	p.State, p.Failover = StateOpen, ""
	if state.Closed() {
		p.State, p.Failover = StateClosed, state.Fence.Failover
		if strings.HasPrefix(p.Failover, endFence) {
			p.State = StateEnded
		}
	}
	if p.Ended != nil && p.State == StateOpen {
		p.State = StateEnded
	}
	if damage != nil {
		p.State = StateDamaged
		p.Problem = reasonText(s.chainError(ctx, lineage, damage, "newer points than these cannot be read"))
	}
	return r, points, nil
}

func point(p replica.Point, pins map[replica.Seq][]string) Point {
	state := "received"
	switch {
	case p.Checkpointed:
		state = "checkpointed"
	case p.Processed:
		state = "processed"
	}
	return Point{Ordinal: uint64(p.Ordinal), Sequence: uint64(p.Seq), CutTime: p.CutTime.UTC(), Consistency: string(p.Consistency), State: state, Bytes: p.Bytes,
		Pins: append([]string{}, pins[p.Seq]...)}
}

// Points lists a lineage's points, oldest first. warning says what could not be read and does not matter to a recovery.
func (s *Session) Points(ctx context.Context, p *Protection) (out []Point, warning string, err error) {
	r, points, err := s.open(ctx, p)
	if err != nil {
		return nil, "", err
	}
	pins := map[replica.Seq][]string{}
	held, err := r.Pins(ctx)
	if err != nil {
		warning = "pins cannot be read: " + err.Error()
	}
	for _, h := range held {
		pins[h.Seq] = append(pins[h.Seq], h.Owner)
	}
	for _, one := range points {
		out = append(out, point(one, pins))
	}
	return out, warning, nil
}

// Find finds the lineage that a name means: a resource name, a GUID or a display name, and with lineage exactly that one.
// Several lineages of one VM: the newest open one is taken, and note says so. A name of several VMs is refused.
func (s *Session) Find(ctx context.Context, vm, lineage string) (found *Protection, note string, err error) {
	survey, err := s.identify(ctx)
	if err != nil {
		return nil, "", err
	}
	return s.find(ctx, survey, vm, lineage)
}

func (s *Session) find(ctx context.Context, survey *Survey, vm, lineage string) (*Protection, string, error) {
	if lineage != "" {
		l, err := replica.ParseLineage(lineage)
		if err != nil {
			return nil, "", errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "--lineage")
		}
		lineage = string(l)
	}
	var hits []*Protection
	vms := map[string]bool{}
	for _, p := range survey.Protections {
		if lineage != "" && p.Lineage != lineage || vm != "" && !p.means(vm) {
			continue
		}
		hits = append(hits, p)
		vms[cmp.Or(p.VM, p.Lineage)] = true
	}
	switch {
	case len(hits) == 0 && lineage != "" && vm != "":
		return nil, "", errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "lineage %s of %q is not in this store; without --vm the command lists what is", lineage, vm)
	case len(hits) == 0:
		return nil, "", errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "this store holds no machine %q; without --vm the command lists what it holds", cmp.Or(vm, lineage)).With("vm", vm)
	case len(vms) > 1:
		return nil, "", errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "%q means %d machines: %s; use the name or id of one", vm, len(vms), strings.Join(sortedKeys(vms), ", "))
	}
	if err := s.each(ctx, hits, nil, s.inspect); err != nil {
		return nil, "", err
	}
	slices.SortStableFunc(hits, func(a, b *Protection) int {
		if (a.Points > 0) != (b.Points > 0) { // one without a point is of no use
			return cmp.Compare(btoi(b.Points > 0), btoi(a.Points > 0))
		}
		return newerFirst(a, b)
	})
	if hits[0].err != nil {
		return nil, "", hits[0].err
	}
	note := ""
	if len(hits) > 1 {
		var others []string
		for _, o := range hits[1:] {
			others = append(others, fmt.Sprintf("%s (%s, %d points)", o.Lineage, o.State, o.Points))
		}
		note = fmt.Sprintf("%s has %d lineages: taking %s (%s); others: %s", hits[0].Title(), len(hits), hits[0].Lineage, hits[0].State, strings.Join(others, ", "))
	}
	return hits[0], note, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func sortedKeys(m map[string]bool) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// means says whether a name is this VM's. A lineage without a name is found by its id.
func (p *Protection) means(name string) bool {
	site, id := "", name
	if parts := strings.Split(name, "/"); len(parts) == 4 && parts[0] == "sites" && parts[2] == "vms" {
		site, id = parts[1], parts[3]
	}
	if site != "" && p.Site() != site {
		return false
	}
	return strings.EqualFold(p.ID(), id) && id != "" || p.DisplayName != "" && strings.EqualFold(p.DisplayName, id) || p.VM == "" && p.Lineage == id
}

// MarshalJSON keeps empty lists lists.
func (v *Survey) MarshalJSON() ([]byte, error) {
	doc := struct {
		Protections []*Protection     `json:"protections"`
		Policies    []json.RawMessage `json:"policies"`
		Plans       []json.RawMessage `json:"plans"`
		Warnings    []string          `json:"warnings"`
	}{append([]*Protection{}, v.Protections...), []json.RawMessage{}, []json.RawMessage{}, append([]string{}, v.Warnings...)}
	for _, p := range v.Policies {
		doc.Policies = append(doc.Policies, protoDocument(p))
	}
	for _, p := range v.Plans {
		doc.Plans = append(doc.Plans, protoDocument(p))
	}
	return json.Marshal(doc)
}
